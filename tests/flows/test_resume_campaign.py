"""The short form of `python -m benchmarks.resume`."""

from __future__ import annotations

from pathlib import Path

import pytest

from benchmarks.resume.__main__ import Campaign
from benchmarks.resume.cases import NOT_INTERRUPTED
from benchmarks.resume.project import Clock


@pytest.mark.slow
@pytest.mark.timeout(7200)
def test_runs_with_other_settings_than_the_defaults_end_as_undisturbed(tmp_path: Path) -> None:
    """Interrupted somewhere, and resumed with the printed command alone."""
    campaign = Campaign(runs=4, seed=7)
    campaign.run(tmp_path / "work", lanes=1, clock=Clock(7000))
    assert [problem for case in campaign.cases for problem in case.problems] == []
    assert [case for case in campaign.cases if case.stage != NOT_INTERRUPTED]
    assert (campaign.broken_off, campaign.without_servers) == (0, [])
