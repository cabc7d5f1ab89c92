"""Memory of the device that trains: measured, cleaned up, and kept within the budget.

On a GPU the budget is for the whole process as NVML shows it: torch's allocator is capped at the
budget less the CUDA context, so that exceeding it raises an out-of-memory error instead of taking
memory from others. On a CPU it is for the resident set; nothing can cap that from inside, so
`enforce_budget` compares after each step. GB are 2**30 bytes.

Not covered: host memory beside a GPU (the kernel's limit ends such a worker, and
`qwen3ft.failures` tells it), and more than one GPU per process.
"""

from __future__ import annotations

import ctypes
import gc
import os
import resource
import sys
from pathlib import Path
from typing import Any, Literal

from qwen3ft.errors import OutOfMemoryError
from qwen3ft.footprint import CUDA_CONTEXT_BYTES
from qwen3ft.logs import get_logger
from qwen3ft.records import GIB, MemoryStatus

logger = get_logger("memory")

SAFE_SHARE = 0.9
"""Use below this share of the budget counts as safe."""

_OWN_STATUS = Path("/proc/self/status")


class MemoryOptimizer:
    """Watches and bounds the memory of this process.

    Args:
        max_memory_gb: The budget; where the device has less, that is the budget.
        device: 'cuda' for torch's current CUDA device, 'cpu' for resident memory.
    """

    def __init__(self, max_memory_gb: float, device: Literal["cuda", "cpu"]) -> None:
        self.max_memory_gb = max_memory_gb
        self.device = device
        self._context_bytes = CUDA_CONTEXT_BYTES
        self._peak_process_bytes = 0

    def monitor_gpu_memory(self) -> tuple[float, float, float]:
        """(in use by tensors, held by the allocator, budget) in GB.

        On a CPU the first two are the resident set.
        """
        if self.device == "cpu":
            resident_gb = _resident_bytes() / GIB
            return resident_gb, resident_gb, self._total_gb()
        import torch

        return (
            torch.cuda.memory_allocated() / GIB,
            torch.cuda.memory_reserved() / GIB,
            self._total_gb(),
        )

    def cleanup_gpu_memory(self) -> None:
        """Return what nothing refers to any more to the device, or on a CPU to the system."""
        gc.collect()
        if self.device == "cpu":
            _trim_heap()
            return
        import torch

        torch.cuda.empty_cache()
        torch.cuda.ipc_collect()  # type: ignore[no-untyped-call]

    def check_memory_safety(self, required_gb: float) -> bool:
        """Whether `required_gb` more would stay below 90 % of the budget and fit the device."""
        status = self.status()
        used_gb = self._used_bytes() / GIB
        safe = used_gb + required_gb < SAFE_SHARE * status.total_gb
        return safe and required_gb <= status.available_gb

    def optimize_for_training(self) -> None:
        """Hold torch to the budget. Call once, before the first tensor is on the GPU.

        Segments that can grow keep rows of varying length from fragmenting the cache; cuDNN's
        search for kernels is off, as its trials take memory of their own.
        """
        if self.device == "cpu":
            logger.info("budget %.2f GB of resident memory", self._total_gb())
            return
        import torch

        # torch reads its environment variable only once, and this process may be past that.
        torch._C._accelerator_setAllocatorSettings("expandable_segments:True")
        torch.backends.cudnn.benchmark = False
        self._context_bytes = max(CUDA_CONTEXT_BYTES, _measure_context())
        device_bytes = torch.cuda.get_device_properties().total_memory
        cap_bytes = max(0, int(self._total_gb() * GIB) - self._context_bytes)
        torch.cuda.set_per_process_memory_fraction(min(1.0, cap_bytes / device_bytes))
        logger.info(
            "budget %.2f GB: %.2f for tensors, %.2f for the CUDA context",
            self._total_gb(),
            cap_bytes / GIB,
            self._context_bytes / GIB,
        )

    def status(self) -> MemoryStatus:
        """Memory at this moment."""
        allocated_gb, cached_gb, total_gb = self.monitor_gpu_memory()
        used_gb = self._used_bytes() / GIB
        return MemoryStatus(
            allocated_gb=allocated_gb,
            cached_gb=cached_gb,
            total_gb=total_gb,
            available_gb=max(0.0, min(total_gb - used_gb, self._free_on_device_gb())),
            is_safe=used_gb < SAFE_SHARE * total_gb,
        )

    def peak(self) -> tuple[float, float, float]:
        """Highest so far: (in use by tensors, held by the allocator, whole process) in GB.

        On a GPU the last is what NVML showed at most, or the allocator's peak and what the process
        holds beside it, whichever is larger. On a CPU all three are the peak resident set.
        """
        if self.device == "cpu":
            peak_gb = _peak_resident_bytes() / GIB
            return peak_gb, peak_gb, peak_gb
        import torch

        used_bytes = self._used_bytes()
        reserved_bytes = torch.cuda.max_memory_reserved()
        beside_bytes = used_bytes - torch.cuda.memory_reserved()
        process_bytes = max(self._peak_process_bytes, reserved_bytes + beside_bytes)
        return (
            torch.cuda.max_memory_allocated() / GIB,
            reserved_bytes / GIB,
            process_bytes / GIB,
        )

    def enforce_budget(self) -> None:
        """Stop a process on a CPU that grew beyond its budget; on a GPU the allocator does it.

        Raises:
            OutOfMemoryError: of the domain host.
        """
        if self.device == "cuda":
            return
        resident_bytes, budget_gb = _resident_bytes(), self._total_gb()
        if resident_bytes <= budget_gb * GIB:
            return
        raise OutOfMemoryError(
            f"Resident memory is {resident_bytes / GIB:.2f} GB, the budget {budget_gb:.2f} GB.",
            why="The batch needs more than was predicted, or memory leaks.",
            next_command=f"qwen3ft plan --set max_memory_gb={resident_bytes / GIB * 1.2:.1f}",
            domain="host",
            resident_gb=round(resident_bytes / GIB, 4),
            budget_gb=budget_gb,
        )

    def _total_gb(self) -> float:
        if self.device == "cpu":
            import psutil

            device_bytes = psutil.virtual_memory().total
        else:
            import torch

            device_bytes = torch.cuda.get_device_properties().total_memory
        return min(self.max_memory_gb, device_bytes / GIB)

    def _free_on_device_gb(self) -> float:
        if self.device == "cpu":
            import psutil

            return float(psutil.virtual_memory().available / GIB)
        import torch

        # What the allocator holds and does not use is free for this process.
        cached_bytes = torch.cuda.memory_reserved() - torch.cuda.memory_allocated()
        return float((torch.cuda.mem_get_info()[0] + cached_bytes) / GIB)

    def _used_bytes(self) -> int:
        """Memory of the whole process on its device."""
        if self.device == "cpu":
            return _resident_bytes()
        import torch

        used_bytes = _nvml_process_bytes()
        if used_bytes is None:
            used_bytes = torch.cuda.memory_reserved() + self._context_bytes
        self._peak_process_bytes = max(self._peak_process_bytes, used_bytes)
        return used_bytes


# --- NVML ---


def _nvml_device() -> Any:
    """NVML's handle of torch's current device; by UUID, as CUDA_VISIBLE_DEVICES renumbers."""
    import pynvml
    import torch

    pynvml.nvmlInit()
    uuid = str(torch.cuda.get_device_properties().uuid)
    return pynvml.nvmlDeviceGetHandleByUUID(f"GPU-{uuid}")


def _nvml_process_bytes() -> int | None:
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


def _measure_context() -> int:
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
    of_process = _nvml_process_bytes()
    whole = int(of_process if of_process is not None else after - before)
    return min(max(0, whole - torch.cuda.memory_reserved()), 2 * CUDA_CONTEXT_BYTES)


# --- resident memory ---


def _resident_bytes() -> int:
    import psutil

    return int(psutil.Process().memory_info().rss)


def _peak_resident_bytes() -> int:
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


def _trim_heap() -> None:
    """Have glibc return freed memory to the system; other C libraries do it by themselves."""
    if sys.platform == "linux" and hasattr(ctypes.CDLL(None), "malloc_trim"):
        ctypes.CDLL(None).malloc_trim(0)
