"""Memory of the device that trains: measured, cleaned up, and kept within the budget.

On a GPU the budget is for the whole process as NVML shows it: torch's allocator is capped at the
budget less what the process holds beside it (the CUDA context, cuBLAS, cuDNN, Triton's kernels), so
that exceeding it raises an out-of-memory error instead of taking memory from others. What is beside
it is measured again once a second, and the cap follows: a library that takes memory of its own
leaves less to tensors. On a CPU the budget is for the resident set; nothing can cap that from
inside. On both, `enforce_budget` compares after each step and ends a process that exceeds its
budget and cannot clean up. GB are 2**30 bytes.

Where NVML does not list this process (in a container with process ids of its own, under WSL) the
process counts as the allocator's memory and the context measured at the start.

Not covered: what a library takes and returns within one step, host memory beside a GPU (the
kernel's limit ends such a worker, and `qwen3ft.jobs.failures` tells it), and more than one GPU per
process.
"""

from __future__ import annotations

import gc
import logging
import os
import time
from typing import Literal

from qwen3ft.errors import OutOfMemoryError
from qwen3ft.logs import get_logger
from qwen3ft.machine.gpus import CUDA_CONTEXT_BYTES
from qwen3ft.machine.process_memory import (
    measure_context,
    peak_resident_bytes,
    process_bytes,
    resident_bytes,
    told_by_nvml,
    trim_heap,
)
from qwen3ft.records.training import MemoryStatus
from qwen3ft.units import GIB

logger = get_logger("memory")

SAFE_SHARE = 0.9
"""Use below this share of the budget counts as safe."""

LEAN_CUBLAS = {"CUBLAS_WORKSPACE_CONFIG": ":4096:2:16:8", "CUBLASLT_WORKSPACE_SIZE": "8192"}
"""8 MiB for each thread that multiplies matrices, in KiB; torch reads it at its first product."""

CHECK_EVERY_SECONDS = 1.0
"""Asking NVML at every step would take several per cent of a fast one."""


class MemoryOptimizer:
    """Watches and bounds the memory of this process.

    Args:
        max_memory_gb: The budget; where the device has less, that is the budget.
        device: 'cuda' for torch's current CUDA device, 'cpu' for resident memory.
    """

    def __init__(self, max_memory_gb: float, device: Literal["cuda", "cpu"]) -> None:
        self.max_memory_gb = max_memory_gb
        self.device = device
        self._beside_bytes = CUDA_CONTEXT_BYTES
        self._peak_process_bytes = 0
        self._checked = float("-inf")
        self._told = False

    def monitor_gpu_memory(self) -> tuple[float, float, float]:
        """(in use by tensors, held by the allocator, budget) in GB.

        On a CPU the first two are the resident set.
        """
        if self.device == "cpu":
            resident_gb = resident_bytes() / GIB
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
            trim_heap()
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

    def optimize_for_training(self, *, lean: bool = False) -> None:
        """Hold torch to the budget. Call once, before the first tensor is on the GPU.

        Segments that can grow keep rows of varying length from fragmenting the cache; cuDNN's
        search for kernels is off, as its trials take memory of their own.

        Args:
            lean: Have cuBLAS do with the workspace that it has on older cards, a quarter of
                Hopper's; a product that would be split for it may take longer.
        """
        if self.device == "cpu":
            logger.info("budget %.2f GB of resident memory", self._total_gb())
            return
        import torch

        if lean:
            os.environ.update(LEAN_CUBLAS)
        # torch reads its environment variable only once, and this process may be past that.
        torch._C._accelerator_setAllocatorSettings("expandable_segments:True")
        torch.backends.cudnn.benchmark = False
        self._beside_bytes = max(CUDA_CONTEXT_BYTES, measure_context())
        cap_bytes = self._cap_allocator()
        logger.info(
            "budget %.2f GB: %.2f for tensors, %.2f for the CUDA context and libraries",
            self._total_gb(),
            cap_bytes / GIB,
            self._beside_bytes / GIB,
        )

    def status(self) -> MemoryStatus:
        """Memory at this moment."""
        allocated_gb, cached_gb, total_gb = self.monitor_gpu_memory()
        used_gb = self._used_bytes() / GIB
        beside_gb = 0.0 if self.device == "cpu" else max(0.0, used_gb - cached_gb)
        return MemoryStatus(
            allocated_gb=allocated_gb,
            cached_gb=cached_gb,
            total_gb=total_gb,
            available_gb=max(0.0, min(total_gb - used_gb, self._free_on_device_gb())),
            is_safe=used_gb < SAFE_SHARE * total_gb,
            beside_gb=beside_gb,
        )

    def peak(self) -> tuple[float, float, float]:
        """Highest so far: (in use by tensors, held by the allocator, whole process) in GB.

        On a GPU the last is what NVML showed at most, or the allocator's peak and what the process
        holds beside it, whichever is larger. On a CPU all three are the peak resident set.
        """
        if self.device == "cpu":
            peak_gb = peak_resident_bytes() / GIB
            return peak_gb, peak_gb, peak_gb
        import torch

        used_bytes = self._used_bytes()
        reserved_bytes = torch.cuda.max_memory_reserved()
        beside_bytes = used_bytes - torch.cuda.memory_reserved()
        whole_bytes = max(self._peak_process_bytes, reserved_bytes + beside_bytes)
        return (
            torch.cuda.max_memory_allocated() / GIB,
            reserved_bytes / GIB,
            whole_bytes / GIB,
        )

    def enforce_budget(self) -> None:
        """Stop a process that grew beyond its budget and cannot give enough back.

        Call it after each step: on a GPU it looks once a second.

        Raises:
            OutOfMemoryError: of the domain gpu, or on a CPU of the domain host.
        """
        if self.device == "cuda":
            if time.monotonic() - self._checked < CHECK_EVERY_SECONDS:
                return
            self._checked = time.monotonic()
        budget_bytes = int(self._total_gb() * GIB)
        used_bytes = self._used_bytes()
        if self.device == "cuda":
            self._follow_libraries(used_bytes)
        if used_bytes <= budget_bytes:
            return
        self.cleanup_gpu_memory()
        left_bytes = self._used_bytes()
        logger.log(
            logging.DEBUG if self._told else logging.WARNING,
            "the process took %.2f GB of its %.2f GB, after cleaning up %.2f",
            used_bytes / GIB,
            budget_bytes / GIB,
            left_bytes / GIB,
        )
        self._told = True
        if left_bytes > budget_bytes:
            raise over_budget(left_bytes, budget_bytes, self.device, self._reserved_bytes())

    def _follow_libraries(self, used_bytes: int) -> None:
        """Leave the allocator less where libraries have taken more; never more again."""
        beside_bytes = used_bytes - self._reserved_bytes()
        if beside_bytes <= self._beside_bytes:
            return
        grown_bytes, self._beside_bytes = beside_bytes - self._beside_bytes, beside_bytes
        cap_bytes = self._cap_allocator()
        logger.info(
            "libraries took %.2f GB more beside the allocator, %.2f in all: %.2f are for tensors",
            grown_bytes / GIB,
            beside_bytes / GIB,
            cap_bytes / GIB,
        )

    def _cap_allocator(self) -> int:
        """Hold torch's allocator to what the budget leaves it; the bytes."""
        import torch

        device_bytes = torch.cuda.get_device_properties().total_memory
        cap_bytes = max(0, int(self._total_gb() * GIB) - self._beside_bytes)
        torch.cuda.set_per_process_memory_fraction(min(1.0, cap_bytes / device_bytes))
        return cap_bytes

    def _reserved_bytes(self) -> int:
        """What torch's allocator holds on the GPU; 0 on a CPU."""
        if self.device == "cpu":
            return 0
        import torch

        return int(torch.cuda.memory_reserved())

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
            return resident_bytes()
        import torch

        used_bytes = process_bytes(told_by_nvml(), torch.cuda.memory_reserved(), self._beside_bytes)
        self._peak_process_bytes = max(self._peak_process_bytes, used_bytes)
        return used_bytes


def over_budget(
    used_bytes: int, budget_bytes: int, device: Literal["cuda", "cpu"], reserved_bytes: int = 0
) -> OutOfMemoryError:
    """The error of a process that exceeds its budget, as torch's own would be answered."""
    used_gb, budget_gb = used_bytes / GIB, budget_bytes / GIB
    suggestion = f"qwen3ft plan --set max_memory_gb={used_gb * 1.2:.1f}"
    if device == "cpu":
        return OutOfMemoryError(
            f"Resident memory is {used_gb:.2f} GB, the budget {budget_gb:.2f} GB.",
            why="The batch needs more than was predicted, or memory leaks.",
            next_command=suggestion,
            domain="host",
            resident_gb=round(used_gb, 4),
            budget_gb=budget_gb,
        )
    beside_gb = (used_bytes - reserved_bytes) / GIB
    return OutOfMemoryError(
        f"The process has {used_gb:.2f} GB of the GPU, the budget is {budget_gb:.2f} GB.",
        why=f"{beside_gb:.2f} GB of it are not torch's: the CUDA context and libraries "
        f"(cuBLAS, cuDNN, Triton); its allocator holds {reserved_bytes / GIB:.2f} GB.",
        next_command=suggestion,
        domain="gpu",
        used_gb=round(used_gb, 4),
        reserved_gb=round(reserved_bytes / GIB, 4),
        beside_gb=round(beside_gb, 4),
        budget_gb=budget_gb,
    )
