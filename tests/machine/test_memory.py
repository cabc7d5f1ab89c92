"""Memory is measured, returned and bounded: on the CPU, and on a GPU where there is one."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import textwrap
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import psutil
import pynvml
import pytest

from qwen3ft.config import load_config, parse_config
from qwen3ft.errors import ConfigError, OutOfMemoryError
from qwen3ft.machine import process_memory
from qwen3ft.machine.gpus import CUDA_CONTEXT_BYTES, visible_gpus
from qwen3ft.machine.memory import MemoryOptimizer
from qwen3ft.machine.process_memory import process_bytes
from qwen3ft.records.training import MemoryStatus
from qwen3ft.units import GIB


def run_python(program: str) -> str:
    """Return the output of a fresh interpreter, so that peaks are the program's own."""
    command = [sys.executable, "-c", textwrap.dedent(program)]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def test_on_a_cpu_memory_is_the_resident_set() -> None:
    """Allocated and cached are close to psutil's number; the total is at most the machine's."""
    allocated_gb, cached_gb, total_gb = MemoryOptimizer(4.0, "cpu").monitor_gpu_memory()
    assert allocated_gb == cached_gb
    assert allocated_gb == pytest.approx(psutil.Process().memory_info().rss / GIB, rel=0.1)
    machine_gb = psutil.virtual_memory().total / GIB
    assert total_gb == min(4.0, machine_gb)
    assert MemoryOptimizer(10**6, "cpu").monitor_gpu_memory()[2] == machine_gb


def test_the_status_says_what_is_left_and_whether_it_is_safe() -> None:
    """Available is the budget less the use; below 90 % is safe."""
    resident_gb = psutil.Process().memory_info().rss / GIB
    roomy = MemoryOptimizer(resident_gb * 2, "cpu").status()
    assert roomy.is_safe
    assert roomy.available_gb == pytest.approx(roomy.total_gb - roomy.allocated_gb)
    tight = MemoryOptimizer(resident_gb * 1.02, "cpu").status()
    assert not tight.is_safe
    assert MemoryOptimizer(resident_gb / 2, "cpu").status().available_gb == 0.0


def test_a_requirement_is_safe_only_if_it_fits_with_a_reserve() -> None:
    """More than 90 % of the budget, or than the machine has, is not safe."""
    resident_gb = psutil.Process().memory_info().rss / GIB
    memory = MemoryOptimizer(resident_gb + 1.0, "cpu")
    assert memory.check_memory_safety(0.1)
    assert not memory.check_memory_safety(0.99)
    assert not MemoryOptimizer(10**6, "cpu").check_memory_safety(10**5)


def test_growth_beyond_the_budget_is_stopped_with_the_numbers() -> None:
    """enforce_budget raises exactly when the resident set exceeds the budget."""
    resident_gb = psutil.Process().memory_info().rss / GIB
    MemoryOptimizer(resident_gb + 1.0, "cpu").enforce_budget()
    with pytest.raises(OutOfMemoryError) as caught:
        MemoryOptimizer(resident_gb / 2, "cpu").enforce_budget()
    assert caught.value.facts["domain"] == "host"
    assert caught.value.facts["resident_gb"] > caught.value.facts["budget_gb"]


def test_clean_up_returns_memory_to_the_system() -> None:
    """Freed blocks that the C library keeps are returned, cycles included."""
    freed_mib = float(
        run_python(
            """
            import psutil
            from qwen3ft.machine.memory import MemoryOptimizer
            class Node: pass
            nodes = []
            for _ in range(1500):
                node = Node()
                node.me, node.data = node, bytes(100_000)  # below glibc's threshold for mmap
                nodes.append(node)
            del nodes, node
            before = psutil.Process().memory_info().rss
            MemoryOptimizer(4.0, "cpu").cleanup_gpu_memory()
            print((before - psutil.Process().memory_info().rss) / 2**20)
            """
        )
    )
    assert freed_mib > 50


def test_the_peak_is_remembered_after_the_memory_is_freed() -> None:
    """A spike of 300 MB counts, and the memory of a large parent does not."""
    ballast = bytearray(400 * 2**20)
    ballast[:: 2**12] = b"x" * len(ballast[:: 2**12])
    numbers = run_python(
        """
        from qwen3ft.machine.memory import MemoryOptimizer
        memory = MemoryOptimizer(4.0, "cpu")
        memory.optimize_for_training()
        before = memory.peak()[2]
        spike = bytearray(300 * 2**20)
        spike[::4096] = b"x" * len(spike[::4096])
        del spike
        print(before, memory.peak()[2], memory.monitor_gpu_memory()[0])
        """
    )
    before_gb, peak_gb, now_gb = map(float, numbers.split())
    assert before_gb < 0.3
    assert peak_gb - before_gb == pytest.approx(300 / 1024, rel=0.1)
    assert now_gb < peak_gb - 0.2


class FakeGpu:
    """A GPU of 24 GB: the numbers of torch's allocator and of NVML for this process, in GB."""

    def __init__(self) -> None:
        self.allocated = self.reserved = 0.0
        self.beside = 0.5
        self.listed = True
        self.fraction = 1.0
        self.cleaned = self.asked = 0

    def cap_gb(self) -> float:
        """Return the cap of the allocator."""
        return 24 * self.fraction

    def cuda(self) -> Any:
        """Return the part of torch.cuda that the module uses."""
        return SimpleNamespace(
            memory_allocated=lambda: int(self.allocated * GIB),
            memory_reserved=lambda: int(self.reserved * GIB),
            mem_get_info=lambda: (int((24 - self.reserved - self.beside) * GIB), 24 * GIB),
            get_device_properties=lambda: SimpleNamespace(total_memory=24 * GIB, uuid="1"),
            set_per_process_memory_fraction=self._set_fraction,
            empty_cache=self._empty_cache,
            ipc_collect=lambda: None,
        )

    def nvml(self) -> Any:
        """Return the part of pynvml that the module uses."""
        return SimpleNamespace(
            NVMLError=pynvml.NVMLError,
            NVMLError_NotFound=pynvml.NVMLError_NotFound,
            nvmlInit=lambda: None,
            nvmlDeviceGetHandleByUUID=self._find,
            nvmlDeviceGetComputeRunningProcesses=self._list,
        )

    def _find(self, uuid: str) -> str:
        if uuid != "MIG-1":
            raise pynvml.NVMLError(pynvml.NVML_ERROR_NOT_FOUND)
        return uuid

    def _list(self, handle: str) -> Any:
        self.asked += 1
        used = int((self.reserved + self.beside) * GIB)
        own = SimpleNamespace(pid=os.getpid(), usedGpuMemory=used)
        return [SimpleNamespace(pid=1, usedGpuMemory=GIB), *([own] if self.listed else [])]

    def _set_fraction(self, fraction: float) -> None:
        self.fraction = fraction

    def _empty_cache(self) -> None:
        self.cleaned += 1
        self.reserved = self.allocated


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeGpu]:
    """Torch and NVML report a GPU that does not exist."""
    gpu = FakeGpu()
    monkeypatch.setitem(sys.modules, "torch", SimpleNamespace(cuda=gpu.cuda()))
    monkeypatch.setitem(sys.modules, "pynvml", gpu.nvml())
    process_memory._nvml_device.cache_clear()
    yield gpu
    process_memory._nvml_device.cache_clear()


def test_memory_that_libraries_take_lowers_the_allocators_cap(gpu: FakeGpu) -> None:
    """Allocator and libraries together never exceed the budget; the cap never rises again."""
    memory = MemoryOptimizer(8.0, "cuda", check_every_seconds=0)
    gpu.allocated = gpu.reserved = 4.0
    memory.enforce_budget()
    assert gpu.fraction == 1.0, "less than was assumed: nothing to do"
    for beside, cap in ((2.0, 6.0), (1.0, 6.0), (3.5, 4.5)):
        gpu.beside = beside
        memory.enforce_budget()
        assert gpu.cap_gb() == pytest.approx(cap)
    assert gpu.cleaned == 0


def test_a_process_above_its_budget_first_frees_unused_memory(gpu: FakeGpu) -> None:
    """Cached blocks make room for what a library took; training goes on."""
    memory = MemoryOptimizer(8.0, "cuda", check_every_seconds=0)
    gpu.allocated, gpu.reserved, gpu.beside = 4.0, 7.0, 1.5
    memory.enforce_budget()
    assert (gpu.cleaned, gpu.reserved) == (1, 4.0)
    assert gpu.cap_gb() == pytest.approx(6.5)
    memory.enforce_budget()
    assert gpu.cleaned == 1


def test_a_process_that_stays_above_its_budget_is_stopped_before_others_are_hurt(
    gpu: FakeGpu,
) -> None:
    """Out of memory on the GPU, with the shares of torch and of libraries."""
    memory = MemoryOptimizer(8.0, "cuda", check_every_seconds=0)
    gpu.allocated, gpu.reserved, gpu.beside = 6.0, 6.5, 2.5
    with pytest.raises(OutOfMemoryError) as caught:
        memory.enforce_budget()
    assert gpu.cleaned == 1
    facts = {"domain": "gpu", "used_gb": 8.5, "reserved_gb": 6.0, "beside_gb": 2.5}
    assert facts.items() <= caught.value.facts.items()
    assert "8.50 GB of the GPU, the budget is 8.00 GB" in caught.value.what
    assert "max_memory_gb=10.2" in caught.value.next_command
    json.dumps(caught.value.to_dict())


def test_nvml_is_asked_at_most_once_a_second(gpu: FakeGpu) -> None:
    """Asking at each fast step would cost several per cent of it."""
    memory = MemoryOptimizer(8.0, "cuda", check_every_seconds=60)
    for _ in range(100):
        memory.enforce_budget()
    assert gpu.asked == 1


def test_where_nvml_does_not_list_the_process_its_context_is_added(gpu: FakeGpu) -> None:
    """In a container: the allocator's memory and the assumed context."""
    gpu.listed = False
    gpu.allocated = gpu.reserved = 7.5
    status = MemoryOptimizer(10.0, "cuda").status()
    assert status.beside_gb == CUDA_CONTEXT_BYTES / GIB
    assert status.available_gb == pytest.approx(2.5 - status.beside_gb)
    with pytest.raises(OutOfMemoryError):
        MemoryOptimizer(8.0, "cuda").enforce_budget()


def test_a_number_below_the_allocators_belongs_to_another_process() -> None:
    """The same process id in another container."""
    assert process_bytes(5 * GIB, 4 * GIB, GIB // 2) == 5 * GIB
    assert process_bytes(3 * GIB, 4 * GIB, GIB // 2) == 4 * GIB + GIB // 2
    assert process_bytes(None, 4 * GIB, GIB // 2) == 4 * GIB + GIB // 2


def test_the_status_has_the_memory_outside_the_allocator(gpu: FakeGpu) -> None:
    """On a CPU it is 0."""
    gpu.allocated, gpu.reserved, gpu.beside = 1.0, 2.0, 0.6
    status = MemoryOptimizer(8.0, "cuda").status()
    assert status.beside_gb == pytest.approx(0.6)
    assert status.available_gb == pytest.approx(8 - 2.6)
    assert MemoryOptimizer(8.0, "cpu").status().beside_gb == 0.0


def test_a_status_of_an_older_version_is_read() -> None:
    """Memory outside the allocator was not recorded."""
    numbers = dict.fromkeys(("allocated_gb", "cached_gb", "total_gb", "available_gb"), 1.0)
    assert MemoryStatus.model_validate({**numbers, "is_safe": True}).beside_gb == 0.0


@pytest.mark.parametrize(
    ("budget", "words"),
    [
        (-3, "at least 0.5 GB"),
        (0, "at least 0.5 GB"),
        (0.2, "at least 0.5 GB"),
        (float("nan"), "at least 0.5 GB"),
        (float("-inf"), "at least 0.5 GB"),
        (float("inf"), "at most 1024 GB"),
        (13_000, "not MB or bytes"),
        (13 * 2**30, "not MB or bytes"),
        (True, "not true or false"),
        ("13 GB", "valid number"),
        (None, "valid number"),
    ],
)
def test_an_implausible_budget_is_refused_in_words(budget: Any, words: str) -> None:
    """With the value given, the accepted range, and a command."""
    with pytest.raises(ConfigError) as caught:
        parse_config({"max_memory_gb": budget})
    assert words in caught.value.what
    assert "max_memory_gb" in caught.value.what
    assert repr(budget) in caught.value.what
    assert caught.value.next_command


def test_budgets_in_a_file_are_checked_alike(tmp_path: Path) -> None:
    """YAML has its own names for infinity and NaN; half a GB and 1 TB are allowed."""
    path = tmp_path / "config.yaml"
    for text in (".nan", ".inf", "-.inf", "-1", "1e9", "yes"):
        path.write_text(f"max_memory_gb: {text}\n")
        with pytest.raises(ConfigError, match="max_memory_gb"):
            load_config(path)
    for budget in (0.5, 1024, "13.5"):
        assert parse_config({"max_memory_gb": budget}).max_memory_gb == float(budget)


@pytest.mark.gpu
@pytest.mark.skipif(not visible_gpus({}), reason="needs a CUDA device")
def test_on_a_gpu_the_budget_holds_for_the_whole_process() -> None:
    """Torch is stopped before the process, context included, exceeds the budget."""
    numbers = run_python(
        """
        import torch
        from qwen3ft.machine.memory import MemoryOptimizer
        memory = MemoryOptimizer(3.0, "cuda")
        memory.optimize_for_training()
        held = []
        try:
            while True:
                held.append(torch.ones(2**24, device="cuda"))  # 64 MiB
        except torch.OutOfMemoryError:
            pass
        full = memory.status()
        peak = memory.peak()
        held.clear()
        memory.cleanup_gpu_memory()
        empty = memory.status()
        safe = memory.check_memory_safety(1.0), memory.check_memory_safety(2.5)
        print(full.allocated_gb, full.is_safe, peak[2], empty.cached_gb, empty.is_safe, *safe)
        """
    ).split()
    assert 2.0 < float(numbers[0]) < 3.0
    assert numbers[1] == "False"
    assert float(numbers[0]) < float(numbers[2]) <= 3.0
    assert float(numbers[3]) < 0.1
    assert numbers[4:] == ["True", "True", "False"]


@pytest.mark.gpu
@pytest.mark.skipif(not visible_gpus({}), reason="needs a CUDA device")
def test_on_a_gpu_memory_outside_torch_counts_and_ends_the_process() -> None:
    """Taken from CUDA itself, as libraries do: first the cap falls, then the process is stopped."""
    output = run_python(
        """
        import torch
        from qwen3ft.errors import OutOfMemoryError
        from qwen3ft.machine.memory import MemoryOptimizer
        from qwen3ft.machine.process_memory import nvml_process_bytes
        memory = MemoryOptimizer(3.0, "cuda")
        memory.optimize_for_training()
        if nvml_process_bytes() is None:
            print("unlisted")
            raise SystemExit
        held = torch.ones(2**28, device="cuda")  # 1 GiB
        memory.enforce_budget()
        from ctypes import CDLL, byref, c_size_t, c_void_p
        from pathlib import Path
        loaded = Path("/proc/self/maps").read_text().split()
        library = CDLL(next(path for path in loaded if "libcudart" in path))
        def take(gib):
            assert library.cudaMalloc(byref(c_void_p()), c_size_t(int(gib * 2**30))) == 0
            memory._checked = float("-inf")
        take(0.8)
        memory.enforce_budget()
        print(round(memory.status().beside_gb, 2))
        try:
            more = torch.ones(2**28, device="cuda")
        except torch.OutOfMemoryError:
            print("capped")
        take(1.5)
        try:
            memory.enforce_budget()
        except OutOfMemoryError as error:
            print(error.facts["domain"], error.facts["used_gb"] > 3.0)
        """
    ).split()
    if output == ["unlisted"]:
        pytest.skip("NVML does not list this process")
    assert float(output[0]) > 1.0
    assert output[1:] == ["capped", "gpu", "True"]
