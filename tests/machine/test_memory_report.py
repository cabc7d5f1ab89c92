"""The files that show what filled memory."""

from __future__ import annotations

import json
import pickle
from pathlib import Path

import pytest

from qwen3ft.machine.memory_report import PeakRecorder, record_history, write_memory_report
from qwen3ft.machine.process_memory import MemoryReading
from qwen3ft.units import MIB


def names(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


def test_a_report_on_a_cpu_is_a_text_with_the_reason_and_no_secret(tmp_path: Path) -> None:
    """The reason comes first; sizes follow."""
    write_memory_report(tmp_path / "memory", f"The token hf_{'x' * 30} took 2.00 GB.")
    assert names(tmp_path / "memory") == {"resident.txt"}
    text = (tmp_path / "memory" / "resident.txt").read_text()
    assert text.startswith("The token ")
    assert "hf_xxx" not in text
    assert "rss" in text


def test_a_folder_that_cannot_be_made_costs_the_report_alone(tmp_path: Path) -> None:
    """The failure that is being handled is not replaced by another."""
    (tmp_path / "file").write_text("")
    write_memory_report(tmp_path / "file" / "memory", "x")
    assert (tmp_path / "file").read_text() == ""


def test_the_peak_is_on_disk_as_soon_as_it_is_known(tmp_path: Path) -> None:
    """The step that set it and all counters; less than 2 % more leaves it alone."""
    recorder = PeakRecorder(tmp_path / "memory", "cuda")
    for step, peak, written in ((1, 100, 1), (2, 300, 2), (3, 305, 2), (4, 310, 4)):
        recorder.add(MemoryReading(step, 5, peak_allocated_bytes=peak, inactive_bytes=7))
        assert json.loads(recorder.path.read_text())["step"] == written
    values = json.loads(recorder.path.read_text())
    assert (values["peak_allocated_bytes"], values["inactive_bytes"]) == (310, 7)


@pytest.mark.gpu
def test_on_a_gpu_torchs_summary_and_snapshot_are_written(tmp_path: Path) -> None:
    """The snapshot is the pickle that pytorch.org/memory_viz reads; it names allocating lines."""
    torch = pytest.importorskip("torch")
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    record_history()
    kept = torch.ones(64 * MIB, dtype=torch.uint8, device="cuda")
    write_memory_report(tmp_path, "a test")
    torch.cuda.memory._record_memory_history(None)
    assert names(tmp_path) == {"resident.txt", "summary.txt", "snapshot.pickle"}
    snapshot = pickle.loads((tmp_path / "snapshot.pickle").read_bytes())
    blocks = [block for segment in snapshot["segments"] for block in segment["blocks"]]
    largest = max(blocks, key=lambda block: block["size"])
    assert largest["size"] >= kept.numel()
    assert "test_memory_report.py" in str(largest["frames"])
