"""What NVML says about a card becomes records: who holds how much, and what is free."""

from __future__ import annotations

import os
import subprocess
import sys
from types import SimpleNamespace
from typing import Any

import psutil
import pynvml
import pytest

from qwen3ft.errors import EnvironmentNotReadyError
from qwen3ft.machine import gpus
from qwen3ft.machine.gpus import free_bytes, gpu_use, processes_on, visible_gpus
from qwen3ft.records.machine import GpuProcess, GpuUse
from qwen3ft.units import GIB

CARD = "GPU-1"


class Card:
    """What the library's calls say of one card; errors are the library's own."""

    def __init__(self, compute: Any, graphics: Any) -> None:
        self.compute, self.graphics = compute, graphics
        self.open = 0

    def library(self) -> Any:
        """The names that are used of pynvml."""
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
        if uuid != CARD:
            raise pynvml.NVMLError(pynvml.NVML_ERROR_NOT_FOUND)
        return uuid

    def _list(self, processes: Any) -> Any:
        if isinstance(processes, int):
            raise pynvml.NVMLError(processes)
        return [SimpleNamespace(pid=pid, usedGpuMemory=used) for pid, used in processes]


@pytest.fixture
def nvml(monkeypatch: pytest.MonkeyPatch) -> Card:
    """A card with this process on it, and one that is gone from the process table."""
    card = Card(compute=[(os.getpid(), GIB)], graphics=[(2**31 - 2, 3 * GIB)])
    monkeypatch.setattr(gpus, "pynvml", card.library())
    return card


def test_every_process_on_a_card_is_named_with_what_it_holds(nvml: Card) -> None:
    """Those that compute and those that draw, the largest first; NVML is closed again."""
    gone, own = processes_on(CARD)
    assert own == GpuProcess(pid=os.getpid(), name=psutil.Process().name(), used_bytes=GIB)
    assert gone == GpuProcess(pid=2**31 - 2, name=None, used_bytes=3 * GIB)
    assert free_bytes(CARD) == 20 * GIB
    assert nvml.open == 0


def test_a_process_that_computes_and_draws_is_one(nvml: Card) -> None:
    """NVML lists it twice with the same amount, or once without one."""
    for first, second, known in (
        (GIB, GIB, GIB),
        (GIB, None, GIB),
        (None, GIB, GIB),
        (None, None, None),
    ):
        nvml.compute, nvml.graphics = [(os.getpid(), first)], [(os.getpid(), second)]
        [process] = processes_on(CARD)
        assert process.used_bytes == known


def test_a_list_that_a_card_does_not_give_is_empty(nvml: Card) -> None:
    """A MIG slice has no graphics processes to ask for, and a container may not ask."""
    nvml.compute = pynvml.NVML_ERROR_NO_PERMISSION
    nvml.graphics = pynvml.NVML_ERROR_NOT_SUPPORTED
    assert gpu_use(CARD) == GpuUse(total_bytes=24 * GIB, free_bytes=20 * GIB, processes=())


@pytest.mark.parametrize("error", [pynvml.NVML_ERROR_GPU_IS_LOST, pynvml.NVML_ERROR_UNKNOWN])
def test_a_driver_that_does_not_answer_is_an_error_and_not_an_empty_card(
    nvml: Card, error: int
) -> None:
    """Also a card that is gone; the next command shows what the driver thinks."""
    nvml.compute = error
    for card in (CARD, "GPU-2"):
        with pytest.raises(EnvironmentNotReadyError) as caught:
            gpu_use(card)
        assert caught.value.next_command == "nvidia-smi"
    assert nvml.open == 0


def test_what_holds_a_card_is_told_in_words() -> None:
    """With names and amounts as far as they are known."""
    python = GpuProcess(pid=4711, name="python", used_bytes=int(5.1 * GIB))
    unknown = GpuProcess(pid=12, name=None, used_bytes=None)
    use = GpuUse(total_bytes=24 * GIB, free_bytes=18 * GIB, processes=(python, unknown))
    assert use.describe() == (
        "python (pid 4711) holds 5.1 GB, a process (pid 12) holds memory of the card"
    )
    nobody = use.model_copy(update={"processes": ()})
    assert nobody.describe() == "6.0 GB of the card are taken, and NVML names no process"


def test_looking_at_cards_loads_no_torch() -> None:
    """The flow's process looks before each attempt."""
    program = "import sys, qwen3ft.recovery.shared_gpu; sys.exit('torch' in sys.modules)"
    subprocess.run([sys.executable, "-c", program], check=True)


@pytest.mark.gpu
@pytest.mark.skipif(not visible_gpus({}), reason="needs a CUDA device")
def test_a_real_card_tells_what_it_has_free() -> None:
    """The same totals as when devices are listed."""
    [gpu, *_] = visible_gpus({})
    use = gpu_use(gpu.uuid)
    assert use.total_bytes == gpu.total_bytes
    assert 0 < use.free_bytes <= use.total_bytes
