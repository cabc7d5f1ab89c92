"""What this process takes of its GPU and of the host, as NVML, the kernel and the C library tell.

Guarantees: a number of NVML's that cannot be this process's is not taken for it. Nothing here loads
torch unless a GPU is asked about. Not covered: more than one GPU per process.
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

_OWN_STATUS = Path("/proc/self/status")


# --- NVML ---


@cache
def _nvml_device() -> Any:
    """NVML's handle of torch's current device; by UUID, as CUDA_VISIBLE_DEVICES renumbers.

    Kept, and NVML open, for as long as the process lives: opening it takes longer than asking.
    """
    import pynvml
    import torch

    pynvml.nvmlInit()
    uuid = str(torch.cuda.get_device_properties().uuid)
    try:
        return pynvml.nvmlDeviceGetHandleByUUID(f"GPU-{uuid}")
    except pynvml.NVMLError_NotFound:
        return pynvml.nvmlDeviceGetHandleByUUID(f"MIG-{uuid}")


def told_by_nvml() -> int | None:
    """What NVML shows for this process; None where it does not tell.

    It does not under Windows and WSL, and in a container that has process ids of its own.
    """
    import pynvml

    try:
        processes = pynvml.nvmlDeviceGetComputeRunningProcesses(_nvml_device())
    except pynvml.NVMLError:
        return None
    used = (process.usedGpuMemory for process in processes if process.pid == os.getpid())
    return next(used, None)


def measure_context() -> int:
    """Bytes that CUDA takes on the device for this process beside torch's own; 0 if unknown.

    If NVML does not tell about processes it is the difference on the whole device, in which other
    processes may have a part.
    """
    import pynvml
    import torch

    try:
        before = pynvml.nvmlDeviceGetMemoryInfo(_nvml_device()).used
        torch.ones(1, device="cuda").sum().item()
        after = pynvml.nvmlDeviceGetMemoryInfo(_nvml_device()).used
    except pynvml.NVMLError:
        return 0
    of_process = told_by_nvml()
    whole = int(of_process if of_process is not None else after - before)
    return min(max(0, whole - torch.cuda.memory_reserved()), 2 * CUDA_CONTEXT_BYTES)


def process_bytes(told_bytes: int | None, reserved_bytes: int, beside_bytes: int) -> int:
    """What a process has of a GPU: as NVML tells, or the allocator's and what is beside it.

    Args:
        told_bytes: NVML's number; one below the allocator's is of another process, by an id of
            another container.
        reserved_bytes: What the allocator holds.
        beside_bytes: What was measured or assumed beside it.
    """
    if told_bytes is not None and told_bytes >= reserved_bytes:
        return told_bytes
    return reserved_bytes + beside_bytes


# --- resident memory ---


def resident_bytes() -> int:
    """The resident set of this process."""
    import psutil

    return int(psutil.Process().memory_info().rss)


def peak_resident_bytes() -> int:
    """The peak resident set of this program.

    Linux's VmHWM starts anew with each program; ru_maxrss would include the parent at the moment
    of its fork.
    """
    if _OWN_STATUS.exists():
        for line in _OWN_STATUS.read_text(encoding="utf-8").splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def trim_heap() -> None:
    """Have glibc return freed memory to the system; other C libraries do it by themselves."""
    if sys.platform == "linux" and hasattr(ctypes.CDLL(None), "malloc_trim"):
        ctypes.CDLL(None).malloc_trim(0)


_OWN_PAGES = Path("/proc/self/statm")


@dataclass(frozen=True)
class MemoryReading:
    """One reading; the counters of torch's allocator are 0 on a CPU.

    Attributes:
        step: The optimizer step that just ended.
        private_bytes: Resident memory that no file backs.
        allocated_bytes: In use by tensors on the GPU.
        peak_allocated_bytes: The highest so far, within steps and evaluations.
        reserved_bytes: Held by the allocator.
        inactive_bytes: Held and not in use, in parts of segments: what may be too scattered to use.
        retries: How often the allocator had to give its cache back before it got memory.
    """

    step: int
    private_bytes: int
    allocated_bytes: int = 0
    peak_allocated_bytes: int = 0
    reserved_bytes: int = 0
    inactive_bytes: int = 0
    retries: int = 0


def read_memory(step: int, device: Literal["cuda", "cpu"]) -> MemoryReading:
    """Memory at this moment."""
    if device == "cpu":
        return MemoryReading(step, private_bytes())
    import torch

    return of_allocator(step, private_bytes(), torch.cuda.memory_stats())


def of_allocator(step: int, private: int, statistics: dict[str, Any]) -> MemoryReading:
    """The reading that `torch.cuda.memory_stats()` gives; what a backend does not count is 0."""
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
    """Resident memory of this process less pages of files; all of it where the system won't say."""
    if _OWN_PAGES.exists():
        resident, shared = _OWN_PAGES.read_text(encoding="ascii").split()[1:3]
        return (int(resident) - int(shared)) * os.sysconf("SC_PAGE_SIZE")
    import psutil

    return int(psutil.Process().memory_info().rss)


def free_host_bytes() -> int:
    """What the system can still give to processes."""
    import psutil

    return int(psutil.virtual_memory().available)
