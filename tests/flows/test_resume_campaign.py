"""The short form of `python -m benchmarks.resume`."""

from __future__ import annotations

import time
from pathlib import Path

import pytest

from benchmarks.resume import NOT_INTERRUPTED, campaign


@pytest.mark.slow
@pytest.mark.timeout(7200)
def test_runs_with_other_settings_than_the_defaults_end_as_undisturbed(tmp_path: Path) -> None:
    """Interrupted somewhere, and resumed with the printed command alone."""
    cases = campaign(tmp_path / "work", runs=4, seed=7, until=time.monotonic() + 7000)
    assert [problem for case in cases for problem in case.problems] == []
    assert [case for case in cases if case.stage != NOT_INTERRUPTED]
