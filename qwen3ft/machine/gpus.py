"""The CUDA devices of this machine, read through NVML: no torch, and so no CUDA in this process.

Guarantees: `()` means that there is no NVIDIA driver or that CUDA_VISIBLE_DEVICES hides every
device; a driver that is there and does not answer is an error, never "no GPU".

Not covered: in a container with process ids of its own NVML may list no process, or one by an id
that means another process here; free memory is right there too.
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
from qwen3ft.units import GIB

CUDA_CONTEXT_BYTES = int(0.8 * GIB)
"""What a process takes on the card beside its tensors: CUDA, cuBLAS, kernels. An H100: 0.80 GB."""


NO_DRIVER = (pynvml.NVML_ERROR_LIBRARY_NOT_FOUND, pynvml.NVML_ERROR_DRIVER_NOT_LOADED)


def visible_gpus(environment: Mapping[str, str] = os.environ) -> tuple[GpuInfo, ...]:
    """The CUDA devices that `CUDA_VISIBLE_DEVICES` leaves, read through NVML.

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
    """What the card (or MIG slice) has free at this moment, and which processes are on it.

    Raises:
        EnvironmentNotReadyError: the driver does not answer, or knows no such card any more.
    """
    try:
        with _nvml():
            handle = pynvml.nvmlDeviceGetHandleByUUID(uuid)
            memory = pynvml.nvmlDeviceGetMemoryInfo(handle)
            return GpuUse(
                total_bytes=memory.total,
                free_bytes=memory.free,
                processes=_processes(handle),
            )
    except pynvml.NVMLError as error:
        raise _no_answer(error) from error


def free_bytes(uuid: str) -> int:
    """What the card has free at this moment; raises as `gpu_use`."""
    return gpu_use(uuid).free_bytes


def processes_on(uuid: str) -> tuple[GpuProcess, ...]:
    """The processes that have memory of the card, the largest first; raises as `gpu_use`."""
    return gpu_use(uuid).processes


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
        why="A GPU that cannot be asked cannot be trained on; to train on the CPU knowingly, "
        "set CUDA_VISIBLE_DEVICES to nothing.",
        next_command="nvidia-smi",
    )


def _processes(handle: Any) -> tuple[GpuProcess, ...]:
    """Those that compute and those that draw; one that does both is listed by NVML twice."""
    used: dict[int, int | None] = {}
    for ask in (
        pynvml.nvmlDeviceGetComputeRunningProcesses,
        pynvml.nvmlDeviceGetGraphicsRunningProcesses,
    ):
        try:
            listed = ask(handle)
        except (pynvml.NVMLError_NotSupported, pynvml.NVMLError_NoPermission):
            continue  # for some cards and slices; free memory is what decides
        for process in listed:
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
    """Handles in the order of CUDA_VISIBLE_DEVICES, which CUDA reads up to the first bad entry."""
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
        if name.startswith("GPU-"):  # a UUID may be cut short as long as it stays unique
            matches = [handle for uuid, handle in by_name.items() if uuid.startswith(name)]
        elif name.startswith("MIG-"):
            matches = [pynvml.nvmlDeviceGetHandleByUUID(name)]
        if len(matches) != 1:
            return
        yield matches[0]


def _describe_gpu(handle: Any) -> GpuInfo:
    # a MIG slice has no index or compute capability of its own; its card has
    card = handle
    if pynvml.nvmlDeviceIsMigDeviceHandle(handle):
        card = pynvml.nvmlDeviceGetDeviceHandleFromMigDeviceHandle(handle)
    memory = pynvml.nvmlDeviceGetMemoryInfo(handle)
    major, minor = pynvml.nvmlDeviceGetCudaComputeCapability(card)
    return GpuInfo(
        index=pynvml.nvmlDeviceGetIndex(card),
        name=_text(pynvml.nvmlDeviceGetName(handle)),
        uuid=_text(pynvml.nvmlDeviceGetUUID(handle)),
        total_bytes=memory.total,
        free_bytes=memory.free,
        driver_version=_text(pynvml.nvmlSystemGetDriverVersion()),
        compute_capability=f"{major}.{minor}",
    )


def _text(value: str | bytes) -> str:
    return value.decode() if isinstance(value, bytes) else value
