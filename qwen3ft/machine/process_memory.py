"""Memory of this process on its GPU and on the host, from NVML, torch, the kernel and glibc.

Torch is loaded only to read a GPU. Not covered: more than one GPU per process.
"""

from __future__ import annotations

import ctypes
import os
import resource
import sys
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, Literal

from qwen3ft.machine.gpus import CUDA_CONTEXT_BYTES

_OWN_STATUS, _OWN_PAGES = Path("/proc/self/status"), Path("/proc/self/statm")


# --- NVML ---


@cache
def _nvml_device() -> Any:
    """Return NVML's handle of torch's current device."""
    import pynvml
    import torch

    pynvml.nvmlInit()  # and left open: opening NVML takes longer than a query
    # By UUID, because CUDA_VISIBLE_DEVICES renumbers the devices.
    uuid = str(torch.cuda.get_device_properties().uuid)
    try:
        return pynvml.nvmlDeviceGetHandleByUUID(f"GPU-{uuid}")
    except pynvml.NVMLError_NotFound:
        return pynvml.nvmlDeviceGetHandleByUUID(f"MIG-{uuid}")


def nvml_process_bytes() -> int | None:
    """Return NVML's number for this process; None if it has none.

    It has none under Windows and WSL, and in a container with its own process ids.
    """
    import pynvml

    try:
        processes = pynvml.nvmlDeviceGetComputeRunningProcesses(_nvml_device())
    except pynvml.NVMLError:
        return None
    used = (process.usedGpuMemory for process in processes if process.pid == os.getpid())
    return next(used, None)


def measure_context() -> int:
    """Return the bytes that CUDA takes on the device outside torch's allocator; 0 if unknown."""
    import pynvml
    import torch

    try:
        before = pynvml.nvmlDeviceGetMemoryInfo(_nvml_device()).used
        torch.ones(1, device="cuda").sum().item()
        after = pynvml.nvmlDeviceGetMemoryInfo(_nvml_device()).used
    except pynvml.NVMLError:
        return 0
    of_process = nvml_process_bytes()
    # Without a number for the process, the difference on the device may include other processes.
    whole = int(of_process if of_process is not None else after - before)
    return min(max(0, whole - torch.cuda.memory_reserved()), 2 * CUDA_CONTEXT_BYTES)


def process_bytes(nvml_bytes: int | None, reserved_bytes: int, outside_bytes: int) -> int:
    """Return the GPU memory of a process: NVML's number, or the sum of the two others.

    Args:
        nvml_bytes: Result of `nvml_process_bytes`.
        reserved_bytes: Memory that torch's allocator holds.
        outside_bytes: Memory outside the allocator, measured or assumed.
    """
    # A number below the allocator's belongs to another container's process with the same id.
    if nvml_bytes is not None and nvml_bytes >= reserved_bytes:
        return nvml_bytes
    return reserved_bytes + outside_bytes


# --- resident memory ---


def resident_bytes() -> int:
    """Return the resident set of this process."""
    import psutil

    return int(psutil.Process().memory_info().rss)


def peak_resident_bytes() -> int:
    """Return the peak resident set of this process."""
    # VmHWM is reset on exec; ru_maxrss would include the parent's memory at the fork.
    if _OWN_STATUS.exists():
        for line in _OWN_STATUS.read_text(encoding="utf-8").splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def trim_heap() -> None:
    """Have glibc return freed memory to the system; other C libraries do so themselves."""
    if sys.platform == "linux" and hasattr(ctypes.CDLL(None), "malloc_trim"):
        ctypes.CDLL(None).malloc_trim(0)


@dataclass(frozen=True)
class MemoryReading:
    """Memory at the end of a step; the counters of torch's allocator are 0 on a CPU."""

    step: int
    private_bytes: int
    """Resident memory that no file backs."""
    allocated_bytes: int = 0
    """GPU memory of tensors."""
    peak_allocated_bytes: int = 0
    """Highest value so far, within steps and evaluations."""
    reserved_bytes: int = 0
    """GPU memory that the allocator holds."""
    inactive_bytes: int = 0
    """Unused parts of its segments, which may be too fragmented to use."""
    retries: int = 0
    """Number of times the allocator freed its cache to get memory."""


def read_memory(step: int, device: Literal["cuda", "cpu"]) -> MemoryReading:
    """Read memory now."""
    if device == "cpu":
        return MemoryReading(step, private_bytes())
    import torch

    return reading_of(step, private_bytes(), torch.cuda.memory_stats())


def reading_of(step: int, private: int, statistics: dict[str, Any]) -> MemoryReading:
    """Return the reading in `torch.cuda.memory_stats()`; counters that a backend lacks are 0."""
    return MemoryReading(
        step=step,
        private_bytes=private,
        allocated_bytes=statistics.get("allocated_bytes.all.current", 0),
        peak_allocated_bytes=statistics.get("allocated_bytes.all.peak", 0),
        reserved_bytes=statistics.get("reserved_bytes.all.current", 0),
        inactive_bytes=statistics.get("inactive_split_bytes.all.current", 0),
        retries=statistics.get("num_alloc_retries", 0),
    )


def private_bytes() -> int:
    """Return resident memory less pages of files; without /proc, all resident memory."""
    if _OWN_PAGES.exists():
        resident, shared = _OWN_PAGES.read_text(encoding="ascii").split()[1:3]
        return (int(resident) - int(shared)) * os.sysconf("SC_PAGE_SIZE")
    return resident_bytes()


def free_host_bytes() -> int:
    """Return the host memory that is available to processes."""
    import psutil

    return int(psutil.virtual_memory().available)
