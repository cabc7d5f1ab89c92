"""The CUDA devices of this machine, read through NVML: no torch, and so no CUDA in this process.

Guarantees: `()` means that there is no NVIDIA driver or that CUDA_VISIBLE_DEVICES hides every
device; a driver that is there and does not answer is an error, never "no GPU".
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from typing import Any

import pynvml

from qwen3ft.errors import EnvironmentNotReadyError
from qwen3ft.records import GpuInfo

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
        pynvml.nvmlInit()
    except pynvml.NVMLError as error:
        if error.value in NO_DRIVER:
            return ()
        raise EnvironmentNotReadyError(
            f"The NVIDIA driver does not answer: {error}",
            why="A GPU that cannot be asked cannot be trained on; to train on the CPU knowingly, "
            "set CUDA_VISIBLE_DEVICES to nothing.",
            next_command="nvidia-smi",
        ) from error
    try:
        return tuple(_describe_gpu(handle) for handle in _handles(visible))
    finally:
        pynvml.nvmlShutdown()


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
