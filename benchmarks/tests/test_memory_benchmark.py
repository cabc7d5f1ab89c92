"""The memory benchmark's verdicts follow from its numbers, and it runs from end to end."""

from __future__ import annotations

import copy
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from benchmarks.machine import ROOT
from benchmarks.memory.cases import MATRIX_SHAPES, MICRO_BATCHES, matrix
from benchmarks.memory.report import error_of, grown, report, verdicts


def row(number: int, predicted_gb: float, nvml_gb: float, **more: Any) -> dict[str, Any]:
    return {
        "case": f"4b {number}",
        "status": "ok",
        "predicted_gb": predicted_gb,
        "nvml_gb": nvml_gb,
        "process_gb": nvml_gb,
        "reserved_gb": nvml_gb - 0.7,
        "allocated_gb": nvml_gb - 0.8,
        "parts_gb": {"weights": 2.0, "kept activations": predicted_gb - 2.0},
        "seconds": 7.0,
        **more,
    }


def results(*rows: dict[str, Any], **more: Any) -> dict[str, Any]:
    machine = {"date": "2026-01-01", "gpu": "a GPU", "driver": "1", "versions": {"torch": "2"}}
    return {
        "machine": machine,
        "failed": {},
        "matrix": list(rows),
        "caps": [],
        "least": [],
        **more,
    }


def test_predictions_are_judged_by_the_share_within_and_by_the_worst_underestimate() -> None:
    good = [row(number, 10.4, 10.0) for number in range(23)]
    found = verdicts(results(*good, row(23, 9.8, 10.0)))
    assert list(found.values()) == [True, True, True]
    found = verdicts(results(*good, row(23, 9.6, 10.0)))
    assert list(found.values()) == [True, True, False]
    found = verdicts(results(*good[:21], *(row(number, 11.0, 10.0) for number in (21, 22, 23))))
    assert list(found.values()) == [True, False, True]
    assert not next(iter(verdicts(results(*good)).values()))  # 23 are too few
    assert error_of(row(0, 9.0, 10.0)) == pytest.approx(-0.1)


def test_a_cap_that_is_exceeded_or_crashed_at_flips_its_verdict() -> None:
    fields = {"case": "4b", "contestant": "ours", "cap_gb": 6.0, "detail": ""}
    trained = {**fields, "status": "ok", "nvml_peak_gb": 5.9}
    refused = {**fields, "status": "refused"}
    assert all(verdicts(results(caps=[trained, refused])).values())
    above = verdicts(results(caps=[trained | {"nvml_peak_gb": 6.01}, refused]))
    assert list(above.values()) == [True, False]
    crashed = verdicts(results(caps=[trained, refused | {"status": "out of memory"}]))
    assert list(crashed.values()) == [False, True]


def test_what_grew_is_named_with_its_part() -> None:
    before = results(row(0, 10.0, 10.0), row(1, 10.0, 10.0))
    now = copy.deepcopy(before)
    assert grown(now, before) == []
    now["matrix"][1] |= {"nvml_gb": 10.6, "parts_gb": {"weights": 2.0, "kept activations": 8.7}}
    (problem,) = grown(now, before)
    assert problem.startswith("4b 1: 10.60 GB, before 10.00")
    assert "kept activations, +0.70 GB predicted" in problem
    now["matrix"][1] = {"case": "4b 1", "status": "does not fit", "need_gb": 90.0}
    assert "it fitted before" in grown(now, before)[0]


def test_the_table_has_a_line_for_every_case_and_verdict() -> None:
    shown = results(row(0, 10.0, 10.0), {"case": "8b", "status": "does not fit", "need_gb": 90.0})
    text = report(shown)
    assert "4b 0" in text
    assert "+0.0%" in text
    assert "does not fit, needs 90.00 GB" in text
    assert all(name in text for name in verdicts(shown))


def test_the_matrix_is_drawn_by_its_seed() -> None:
    cases = matrix(MATRIX_SHAPES, 0)
    assert cases == matrix(MATRIX_SHAPES, 0) != matrix(MATRIX_SHAPES, 1)
    for shape, of_shape in cases.items():
        assert len({case.name for case in of_shape}) == len(of_shape) == 4 * len(MICRO_BATCHES)
        assert {case.shape for case in of_shape} == {shape}


@pytest.mark.slow
def test_the_benchmark_runs_from_end_to_end_on_the_tiny_model(tmp_path: Path) -> None:
    """On the CPU, where the peak is the process's; two cases in one process."""
    out = tmp_path / "results.json"
    where = ["--work", str(tmp_path), "--out", str(out), "--suite", "matrix", "--shapes", "tiny"]
    run = subprocess.run(
        [sys.executable, "-m", "benchmarks.memory.campaign", *where, "--count", "2"],
        capture_output=True,
        text=True,
        timeout=200,
        env={**os.environ, "CUDA_VISIBLE_DEVICES": "", "PYTHONPATH": str(ROOT)},
    )
    found = json.loads(out.read_text(encoding="utf-8"))
    assert found["failed"] == {}, run.stderr
    assert [line["status"] for line in found["matrix"]] == ["ok", "ok"]
    for line in found["matrix"]:
        assert 0.2 < line["process_gb"] < line["predicted_gb"]
        assert line["levers"]["micro_batch_size"] == line["micro_batch_size"]
        assert line["levers"]["gradient_checkpointing"] == line["recompute"]
        assert line["case"] in run.stdout
    assert found["verdicts"] == verdicts(found)
