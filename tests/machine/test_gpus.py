"""NVML's answers about a GPU become records: free memory, and the processes on it."""

from __future__ import annotations

import os
from types import SimpleNamespace
from typing import Any

import psutil
import pynvml
import pytest

from qwen3ft.errors import EnvironmentNotReadyError
from qwen3ft.machine import gpus
from qwen3ft.machine.gpus import gpu_use, visible_gpus
from qwen3ft.records.machine import GpuProcess, GpuUse
from qwen3ft.units import GIB

UUID = "GPU-1"


class FakeGpu:
    """A pynvml that knows one GPU and raises pynvml's own errors."""

    def __init__(self, compute: Any, graphics: Any) -> None:
        self.compute, self.graphics = compute, graphics
        self.open = 0

    def library(self) -> Any:
        """Return the part of pynvml that the module uses."""
        return SimpleNamespace(
            NVMLError=pynvml.NVMLError,
            NVMLError_NotSupported=pynvml.NVMLError_NotSupported,
            NVMLError_NoPermission=pynvml.NVMLError_NoPermission,
            nvmlInit=lambda: self._count(1),
            nvmlShutdown=lambda: self._count(-1),
            nvmlDeviceGetHandleByUUID=self._find,
            nvmlDeviceGetMemoryInfo=lambda _: SimpleNamespace(total=24 * GIB, free=20 * GIB),
            nvmlDeviceGetComputeRunningProcesses=lambda _: self._list(self.compute),
            nvmlDeviceGetGraphicsRunningProcesses=lambda _: self._list(self.graphics),
        )

    def _count(self, change: int) -> None:
        self.open += change

    def _find(self, uuid: str) -> str:
        if uuid != UUID:
            raise pynvml.NVMLError(pynvml.NVML_ERROR_NOT_FOUND)
        return uuid

    def _list(self, processes: Any) -> Any:
        if isinstance(processes, int):
            raise pynvml.NVMLError(processes)
        return [SimpleNamespace(pid=pid, usedGpuMemory=used) for pid, used in processes]


@pytest.fixture
def nvml(monkeypatch: pytest.MonkeyPatch) -> FakeGpu:
    """A GPU with this process on it, and one that has left the process table."""
    gpu = FakeGpu(compute=[(os.getpid(), GIB)], graphics=[(2**31 - 2, 3 * GIB)])
    monkeypatch.setattr(gpus, "pynvml", gpu.library())
    return gpu


def test_every_process_on_a_gpu_is_listed_with_its_memory(nvml: FakeGpu) -> None:
    """Compute and graphics processes, the largest first; NVML is closed again."""
    use = gpu_use(UUID)
    gone, own = use.processes
    assert own == GpuProcess(pid=os.getpid(), name=psutil.Process().name(), used_bytes=GIB)
    assert gone == GpuProcess(pid=2**31 - 2, name=None, used_bytes=3 * GIB)
    assert use.free_bytes == 20 * GIB
    assert nvml.open == 0


def test_a_process_that_computes_and_draws_is_one(nvml: FakeGpu) -> None:
    """NVML lists it twice with the same amount, or once without one."""
    for first, second, known in (
        (GIB, GIB, GIB),
        (GIB, None, GIB),
        (None, GIB, GIB),
        (None, None, None),
    ):
        nvml.compute, nvml.graphics = [(os.getpid(), first)], [(os.getpid(), second)]
        [process] = gpu_use(UUID).processes
        assert process.used_bytes == known


def test_a_list_that_a_gpu_does_not_support_is_empty(nvml: FakeGpu) -> None:
    """MIG slices list no graphics processes, and a container may lack the permission."""
    nvml.compute = pynvml.NVML_ERROR_NO_PERMISSION
    nvml.graphics = pynvml.NVML_ERROR_NOT_SUPPORTED
    assert gpu_use(UUID) == GpuUse(total_bytes=24 * GIB, free_bytes=20 * GIB, processes=())


@pytest.mark.parametrize("error", [pynvml.NVML_ERROR_GPU_IS_LOST, pynvml.NVML_ERROR_UNKNOWN])
def test_a_driver_that_does_not_answer_is_an_error_and_not_an_empty_gpu(
    nvml: FakeGpu, error: int
) -> None:
    """Also a GPU that is gone; the next command shows the driver's view."""
    nvml.compute = error
    for uuid in (UUID, "GPU-2"):
        with pytest.raises(EnvironmentNotReadyError) as caught:
            gpu_use(uuid)
        assert caught.value.next_command == "nvidia-smi"
    assert nvml.open == 0


def test_the_use_of_a_gpu_is_described_in_words() -> None:
    """With names and amounts as far as they are known."""
    python = GpuProcess(pid=4711, name="python", used_bytes=int(5.1 * GIB))
    unknown = GpuProcess(pid=12, name=None, used_bytes=None)
    use = GpuUse(total_bytes=24 * GIB, free_bytes=18 * GIB, processes=(python, unknown))
    assert use.describe() == (
        "python (pid 4711) holds 5.1 GB, a process (pid 12) holds memory of the GPU"
    )
    nobody = use.model_copy(update={"processes": ()})
    assert nobody.describe() == "6.0 GB of the GPU are taken, and NVML names no process"


@pytest.mark.gpu
@pytest.mark.skipif(not visible_gpus({}), reason="needs a CUDA device")
def test_a_real_gpu_reports_its_free_memory() -> None:
    """The same totals as when devices are listed."""
    [gpu, *_] = visible_gpus({})
    use = gpu_use(gpu.uuid)
    assert use.total_bytes == gpu.total_bytes
    assert 0 < use.free_bytes <= use.total_bytes
