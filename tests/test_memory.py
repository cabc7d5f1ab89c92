"""Memory is measured, returned and bounded: on the CPU, and on a GPU where there is one."""

from __future__ import annotations

import subprocess
import sys
import textwrap

import psutil
import pytest

from qwen3ft.errors import OutOfMemoryError
from qwen3ft.memory import MemoryOptimizer
from qwen3ft.records import GIB


def run_python(program: str) -> str:
    """The output of a fresh interpreter, so that peaks are the program's own."""
    command = [sys.executable, "-c", textwrap.dedent(program)]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def test_on_a_cpu_memory_is_the_resident_set() -> None:
    """Allocated and cached are the same number, close to what psutil says."""
    allocated_gb, cached_gb, total_gb = MemoryOptimizer(4.0, "cpu").monitor_gpu_memory()
    assert allocated_gb == cached_gb
    assert allocated_gb == pytest.approx(psutil.Process().memory_info().rss / GIB, rel=0.1)
    assert total_gb == min(4.0, psutil.virtual_memory().total / GIB)


def test_a_budget_above_the_machine_is_the_machine() -> None:
    """The total is never more than there is."""
    total_gb = MemoryOptimizer(10**6, "cpu").monitor_gpu_memory()[2]
    assert total_gb == psutil.virtual_memory().total / GIB


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
    """What would pass 90 % of the budget, or what the machine has not got, is not safe."""
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
    """Freed blocks that the C library keeps are given back, cycles included."""
    freed_mib = float(
        run_python(
            """
            import psutil
            from qwen3ft.memory import MemoryOptimizer
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


def test_the_peak_is_remembered_after_the_memory_is_gone() -> None:
    """A spike of 300 MB counts, and the memory of a large parent does not."""
    ballast = bytearray(400 * 2**20)
    ballast[:: 2**12] = b"x" * len(ballast[:: 2**12])
    numbers = run_python(
        """
        from qwen3ft.memory import MemoryOptimizer
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


def test_watching_a_cpu_loads_no_torch() -> None:
    """The import and every method on a CPU stay light."""
    run_python(
        """
        import sys
        from qwen3ft.memory import MemoryOptimizer
        memory = MemoryOptimizer(4.0, "cpu")
        memory.optimize_for_training(); memory.status(); memory.peak(); memory.enforce_budget()
        memory.cleanup_gpu_memory()
        assert "torch" not in sys.modules
        """
    )


@pytest.mark.gpu
def test_on_a_gpu_the_budget_holds_for_the_whole_process() -> None:
    """Torch is stopped before the process, context included, exceeds the budget."""
    torch = pytest.importorskip("torch")
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    numbers = run_python(
        """
        import torch
        from qwen3ft.memory import MemoryOptimizer
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
