"""Training needs no more memory than it did, and where it does, the phase is named."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

from benchmarks.memory.baseline import BASELINE, grown, measure

BEFORE = {"imports": 400.0, "load": 420.0, "train": 500.0, "evaluate": 510.0}


@pytest.mark.skipif(sys.platform != "linux", reason="RssAnon is Linux's")
def test_the_embedded_training_needs_no_more_memory_than_the_baseline(
    tmp_path: Path,
) -> None:
    now = measure(tmp_path)
    assert {"imports", "load", "train", "evaluate"} <= now.keys()
    problem = grown(now, json.loads(BASELINE.read_text(encoding="utf-8"))["mib"])
    assert problem is None, problem


def test_the_phase_in_which_memory_grew_is_named() -> None:
    assert grown(BEFORE, BEFORE) is None
    assert grown({**BEFORE, "evaluate": 530.0}, BEFORE) is None
    problem = grown({**BEFORE, "train": 560.0, "evaluate": 570.0}, BEFORE)
    assert problem is not None
    assert "570.0 MiB, 11.8% above" in problem
    assert "'train': 560.0 MiB, before 500.0" in problem
    problem = grown({phase: size + 60 for phase, size in BEFORE.items()}, BEFORE)
    assert problem is not None
    assert "'imports'" in problem
