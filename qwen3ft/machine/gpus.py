"""CUDA devices of this machine, read through NVML, so that this process needs no CUDA context.

No device means that there is no NVIDIA driver or that CUDA_VISIBLE_DEVICES hides every device; a
driver that does not answer is an error. Not covered: in a container with its own process ids NVML
may list no process, or an id that means another process here. Free memory is right there too.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import psutil
import pynvml

from qwen3ft.errors import EnvironmentNotReadyError
from qwen3ft.records.machine import GpuInfo, GpuProcess, GpuUse
from qwen3ft.units import MIB

CUDA_CONTEXT_BYTES = 840 * MIB
"""GPU memory of a process besides its tensors: CUDA, cuBLAS, kernels as they are first used; 709 to
831 MiB of a training on an H100 and an H200 (`benchmarks.memory.campaign`)."""

NO_DRIVER = (pynvml.NVML_ERROR_LIBRARY_NOT_FOUND, pynvml.NVML_ERROR_DRIVER_NOT_LOADED)


def visible_gpus(environment: Mapping[str, str] = os.environ) -> tuple[GpuInfo, ...]:
    """Return the CUDA devices that `CUDA_VISIBLE_DEVICES` leaves, in its order.

    Raises:
        EnvironmentNotReadyError: there is an NVIDIA driver but it does not answer.
    """
    visible = environment.get("CUDA_VISIBLE_DEVICES")
    if visible is not None and visible.strip() in ("", "-1"):
        return ()
    try:
        with _nvml():
            return tuple(_describe_gpu(handle) for handle in _handles(visible))
    except pynvml.NVMLError as error:
        if error.value in NO_DRIVER:
            return ()
        raise _no_answer(error) from error


def gpu_use(uuid: str) -> GpuUse:
    """Return the free memory of a GPU (or MIG slice) now, and the processes on it.

    Raises:
        EnvironmentNotReadyError: the driver does not answer, or the GPU is gone.
    """
    try:
        with _nvml():
            handle = pynvml.nvmlDeviceGetHandleByUUID(uuid)
            memory = pynvml.nvmlDeviceGetMemoryInfo(handle)
            return GpuUse(
                total_bytes=memory.total, free_bytes=memory.free, processes=_processes(handle)
            )
    except pynvml.NVMLError as error:
        raise _no_answer(error) from error


@contextmanager
def _nvml() -> Iterator[None]:
    pynvml.nvmlInit()
    try:
        yield
    finally:
        pynvml.nvmlShutdown()


def _no_answer(error: pynvml.NVMLError) -> EnvironmentNotReadyError:
    return EnvironmentNotReadyError(
        f"The NVIDIA driver does not answer: {error}",
        why="Training needs a GPU that answers; to train on the CPU instead, set "
        "CUDA_VISIBLE_DEVICES to an empty value.",
        next_command="nvidia-smi",
    )


def _processes(handle: Any) -> tuple[GpuProcess, ...]:
    """Return the compute and graphics processes, the largest first."""
    used: dict[int, int | None] = {}
    for ask in (
        pynvml.nvmlDeviceGetComputeRunningProcesses,
        pynvml.nvmlDeviceGetGraphicsRunningProcesses,
    ):
        try:
            listed = ask(handle)
        except (pynvml.NVMLError_NotSupported, pynvml.NVMLError_NoPermission):
            continue  # as on MIG slices; decisions are made by free memory, not by this list
        for process in listed:
            # A process that computes and draws is in both lists.
            amounts = (used.get(process.pid), process.usedGpuMemory)
            known = [amount for amount in amounts if amount is not None]
            used[process.pid] = max(known, default=None)
    found = (
        GpuProcess(pid=pid, name=_process_name(pid), used_bytes=amount)
        for pid, amount in used.items()
    )
    return tuple(sorted(found, key=lambda process: -(process.used_bytes or 0)))


def _process_name(pid: int) -> str | None:
    try:
        return psutil.Process(pid).name()
    except psutil.Error:
        return None


def _handles(visible: str | None) -> Iterator[Any]:
    """Yield handles in the order of CUDA_VISIBLE_DEVICES; stop at a bad entry, as CUDA does."""
    every = [
        pynvml.nvmlDeviceGetHandleByIndex(index) for index in range(pynvml.nvmlDeviceGetCount())
    ]
    if visible is None:
        yield from every
        return
    by_name = {str(index): handle for index, handle in enumerate(every)}
    by_name |= {_text(pynvml.nvmlDeviceGetUUID(handle)): handle for handle in every}
    for entry in visible.split(","):
        name = entry.strip()
        matches = [by_name[name]] if name in by_name else []
        if name.startswith("GPU-"):  # a UUID may be shortened as long as it stays unique
            matches = [handle for uuid, handle in by_name.items() if uuid.startswith(name)]
        elif name.startswith("MIG-"):
            matches = [pynvml.nvmlDeviceGetHandleByUUID(name)]
        if len(matches) != 1:
            return
        yield matches[0]


def _describe_gpu(handle: Any) -> GpuInfo:
    # A MIG slice has no index or compute capability of its own; its parent device has.
    device = handle
    if pynvml.nvmlDeviceIsMigDeviceHandle(handle):
        device = pynvml.nvmlDeviceGetDeviceHandleFromMigDeviceHandle(handle)
    memory = pynvml.nvmlDeviceGetMemoryInfo(handle)
    major, minor = pynvml.nvmlDeviceGetCudaComputeCapability(device)
    return GpuInfo(
        index=pynvml.nvmlDeviceGetIndex(device),
        name=_text(pynvml.nvmlDeviceGetName(handle)),
        uuid=_text(pynvml.nvmlDeviceGetUUID(handle)),
        total_bytes=memory.total,
        free_bytes=memory.free,
        driver_version=_text(pynvml.nvmlSystemGetDriverVersion()),
        compute_capability=f"{major}.{minor}",
    )


def _text(value: str | bytes) -> str:
    return value.decode() if isinstance(value, bytes) else value
