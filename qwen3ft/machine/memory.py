"""Memory of the training device: measured, cleaned up, and kept within the budget.

On a GPU the budget covers the whole process as NVML shows it. Torch's allocator is capped at the
budget less the memory outside it (CUDA context, cuBLAS, cuDNN, Triton's kernels), so exceeding the
budget raises an out-of-memory error instead of taking memory from others. On a CPU the budget is
for the resident set, which nothing can cap from inside. On both, `enforce_budget` compares after
each step and ends a process that exceeds its budget and cannot clean up.

Not covered: memory that a library takes and frees within one step; host memory beside a GPU (the
kernel kills such a worker, and `qwen3ft.jobs.failures` reports it); several GPUs per process.
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
    free_host_bytes,
    measure_context,
    nvml_process_bytes,
    peak_resident_bytes,
    process_bytes,
    resident_bytes,
    trim_heap,
)
from qwen3ft.records.training import MemoryStatus
from qwen3ft.units import GIB, gb, size_text

logger = get_logger("memory")

SAFE_SHARE = 0.9
"""Memory use is safe below this share of the budget."""

LEAN_CUBLAS = {"CUBLAS_WORKSPACE_CONFIG": ":4096:2:16:8", "CUBLASLT_WORKSPACE_SIZE": "8192"}
"""A cuBLAS workspace of 8 MiB per thread; torch reads the variables at its first matmul."""

CHECK_EVERY_SECONDS = 1.0
"""Asking NVML at every step would cost several per cent of a fast step."""


class MemoryOptimizer:
    """Memory of this process: measure it, and keep it within the budget.

    Args:
        max_memory_gb: The budget in GB; at most the memory of the device.
        device: 'cuda' for torch's current CUDA device, 'cpu' for resident memory.
        check_every_seconds: Shortest time between two checks on a GPU.
    """

    def __init__(
        self,
        max_memory_gb: float,
        device: Literal["cuda", "cpu"],
        *,
        check_every_seconds: float = CHECK_EVERY_SECONDS,
    ) -> None:
        self.max_memory_gb = max_memory_gb
        self.device = device
        self.check_every_seconds = check_every_seconds
        self._outside_bytes = CUDA_CONTEXT_BYTES  # of the process, outside torch's allocator
        self._peak_process_bytes = 0
        self._checked = float("-inf")
        self._warned = False

    def monitor_gpu_memory(self) -> tuple[float, float, float]:
        """Return (in use by tensors, held by the allocator, budget) in GB.

        On a CPU the first two are the resident set.
        """
        if self.device == "cpu":
            resident_gb = gb(resident_bytes())
            return resident_gb, resident_gb, self._total_gb()
        import torch

        return (
            gb(torch.cuda.memory_allocated()),
            gb(torch.cuda.memory_reserved()),
            self._total_gb(),
        )

    def cleanup_gpu_memory(self) -> None:
        """Free unreferenced memory, to the device or on a CPU to the system."""
        gc.collect()
        if self.device == "cpu":
            trim_heap()
            return
        import torch

        torch.cuda.empty_cache()
        torch.cuda.ipc_collect()  # type: ignore[no-untyped-call]

    def check_memory_safety(self, required_gb: float) -> bool:
        """Return True if `required_gb` more stay below 90 % of the budget and fit the device."""
        status = self.status()
        used_gb = gb(self._used_bytes())
        safe = used_gb + required_gb < SAFE_SHARE * status.total_gb
        return safe and required_gb <= status.available_gb

    def optimize_for_training(self, *, lean: bool = False) -> None:
        """Limit torch to the budget; call once, before the first tensor is on the GPU.

        Args:
            lean: Give cuBLAS the workspace of GPUs older than Hopper, a quarter of Hopper's; a
                few matrix products become slower.
        """
        if self.device == "cpu":
            logger.info("budget %.2f GB of resident memory", self._total_gb())
            return
        import torch

        if lean:
            os.environ.update(LEAN_CUBLAS)
        # Expandable segments keep rows of varying length from fragmenting the cache. Torch reads
        # PYTORCH_CUDA_ALLOC_CONF only once, and this process may be past that point.
        torch._C._accelerator_setAllocatorSettings("expandable_segments:True")
        torch.backends.cudnn.benchmark = False  # its trials take memory of their own
        self._outside_bytes = max(CUDA_CONTEXT_BYTES, measure_context())
        cap_bytes = self._cap_allocator()
        logger.info(
            "budget %.2f GB: %.2f for tensors, %.2f for the CUDA context and libraries",
            self._total_gb(),
            gb(cap_bytes),
            gb(self._outside_bytes),
        )

    def status(self) -> MemoryStatus:
        """Return the memory now."""
        allocated_gb, cached_gb, total_gb = self.monitor_gpu_memory()
        used_gb = gb(self._used_bytes())
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
        """Return the highest (in use by tensors, held by the allocator, whole process) in GB.

        On a GPU the last is the larger of NVML's highest number, and the allocator's peak plus the
        memory outside it. On a CPU all three are the peak resident set.
        """
        if self.device == "cpu":
            peak_gb = gb(peak_resident_bytes())
            return peak_gb, peak_gb, peak_gb
        import torch

        used_bytes = self._used_bytes()
        reserved_bytes = torch.cuda.max_memory_reserved()
        beside_bytes = used_bytes - torch.cuda.memory_reserved()
        whole_bytes = max(self._peak_process_bytes, reserved_bytes + beside_bytes)
        return (gb(torch.cuda.max_memory_allocated()), gb(reserved_bytes), gb(whole_bytes))

    def enforce_budget(self) -> None:
        """Raise if the process exceeds its budget and a clean-up does not help.

        Call it after each step; on a GPU it asks NVML once a second.

        Raises:
            OutOfMemoryError: of the domain gpu, or on a CPU of the domain host.
        """
        if self.device == "cuda":
            if time.monotonic() - self._checked < self.check_every_seconds:
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
            logging.DEBUG if self._warned else logging.WARNING,
            "the process took %.2f GB of its budget of %.2f GB, %.2f GB after a clean-up",
            gb(used_bytes),
            gb(budget_bytes),
            gb(left_bytes),
        )
        self._warned = True
        if left_bytes > budget_bytes:
            raise over_budget(left_bytes, budget_bytes, self.device, self._reserved_bytes())

    def _follow_libraries(self, used_bytes: int) -> None:
        """Lower the allocator's cap when libraries take more memory; it is never raised again."""
        beside_bytes = used_bytes - self._reserved_bytes()
        if beside_bytes <= self._outside_bytes:
            return
        grown_bytes, self._outside_bytes = beside_bytes - self._outside_bytes, beside_bytes
        cap_bytes = self._cap_allocator()
        logger.info(
            "libraries took %.2f GB more, %.2f GB in all; %.2f GB are left for tensors",
            gb(grown_bytes),
            gb(beside_bytes),
            gb(cap_bytes),
        )

    def _cap_allocator(self) -> int:
        """Cap torch's allocator at the budget less the memory outside it; return the bytes."""
        import torch

        device_bytes = torch.cuda.get_device_properties().total_memory
        cap_bytes = max(0, int(self._total_gb() * GIB) - self._outside_bytes)
        torch.cuda.set_per_process_memory_fraction(min(1.0, cap_bytes / device_bytes))
        return cap_bytes

    def _reserved_bytes(self) -> int:
        """Return the bytes that torch's allocator holds on the GPU; 0 on a CPU."""
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
        return min(self.max_memory_gb, gb(device_bytes))

    def _free_on_device_gb(self) -> float:
        if self.device == "cpu":
            return gb(free_host_bytes())
        import torch

        # Cached memory that no tensor uses is free for this process.
        cached_bytes = torch.cuda.memory_reserved() - torch.cuda.memory_allocated()
        return gb(torch.cuda.mem_get_info()[0] + cached_bytes)

    def _used_bytes(self) -> int:
        """Return the bytes of the whole process on its device."""
        if self.device == "cpu":
            return resident_bytes()
        import torch

        used_bytes = process_bytes(
            nvml_process_bytes(), torch.cuda.memory_reserved(), self._outside_bytes
        )
        self._peak_process_bytes = max(self._peak_process_bytes, used_bytes)
        return used_bytes


def over_budget(
    used_bytes: int, budget_bytes: int, device: Literal["cuda", "cpu"], reserved_bytes: int = 0
) -> OutOfMemoryError:
    """Return the error of a process that exceeds its budget; recovery treats it as torch's own."""
    used_gb, budget_gb = gb(used_bytes), gb(budget_bytes)
    suggestion = f"qwen3ft plan --set max_memory_gb={used_gb * 1.2:.1f}"
    if device == "cpu":
        return OutOfMemoryError(
            f"Resident memory is {used_gb:.2f} GB, the budget is {budget_gb:.2f} GB.",
            why="A batch needs more than was predicted, or memory leaks.",
            next_command=suggestion,
            domain="host",
            resident_gb=round(used_gb, 4),
            budget_gb=budget_gb,
        )
    beside_gb = gb(used_bytes - reserved_bytes)
    return OutOfMemoryError(
        f"The process takes {used_gb:.2f} GB of the GPU, the budget is {budget_gb:.2f} GB.",
        why=f"{beside_gb:.2f} GB of it belong to the CUDA context and libraries (cuBLAS, cuDNN, "
        f"Triton); torch's allocator holds {size_text(reserved_bytes)}.",
        next_command=suggestion,
        domain="gpu",
        used_gb=round(used_gb, 4),
        reserved_gb=round(gb(reserved_bytes), 4),
        beside_gb=round(beside_gb, 4),
        budget_gb=budget_gb,
    )
