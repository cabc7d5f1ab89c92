"""The scaling benchmark: a part that fails costs nothing else."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import pytest

from benchmarks.jobs import JobFailedError
from benchmarks.scaling.answering import steps_needed
from benchmarks.scaling.campaign import Campaign, compared


@pytest.fixture
def campaign(tmp_path: Path) -> Campaign:
    """A campaign of nine minutes in which nothing has run."""
    asked = argparse.Namespace(minutes=9.0, steps=None, out=tmp_path / "out.json", models=["4b"])
    return Campaign(asked, tmp_path, [])


def test_a_part_that_fails_becomes_a_row_and_the_next_one_runs(campaign: Campaign) -> None:
    """Each row is on disk as soon as its part has ended."""

    def fails(row: Any) -> dict[str, Any]:
        raise JobFailedError("out of memory", "of GPU 1")

    campaign.part("train", "4b", 2, fails, rows=64)
    campaign.part("train", "4b", 1, lambda row: {"tokens_per_second": 5.0}, rows=64)
    rows = json.loads(campaign.asked.out.read_text())["rows"]
    assert [row["status"] for row in rows] == ["out of memory", "ok"]
    assert list(campaign.bars.values()) == [False, True]


def test_what_cannot_end_in_time_is_left_out(campaign: Campaign) -> None:
    """Also what would hang again because no ranks have met so far."""
    campaign.part("train", "4b", 2, lambda row: 1 / 0)
    campaign.part("train", "4b", 2, lambda row: 1 / 0)
    campaign.part("train", "4b", 2, lambda row: {})
    campaign.part("train", "4b", 1, lambda row: {})
    campaign.end = 0.0
    campaign.part("train", "4b", 1, lambda row: {})
    states = [row["status"].partition(":")[0] for row in campaign.rows]
    assert states == ["failed", "failed", "left out", "ok", "left out"]


def test_the_worst_step_decides_about_the_losses() -> None:
    alone = {"tokens_per_second": 100.0, "losses": [4.0, 2.0]}
    found = compared({"tokens_per_second": 190.0, "losses": [4.0, 2.02]}, alone, 2)
    assert found == {"speedup": 1.9, "efficiency": 0.95, "loss_drift": pytest.approx(0.01)}


def test_more_slots_than_answers_save_no_step() -> None:
    """Two GPUs answer eight questions on four slots no faster than the longest is written."""
    lengths = [3, 9, 3, 3, 3, 3, 3, 3]
    assert steps_needed(lengths, 4) == 9
    assert max(steps_needed(lengths[number::2], 4) for number in range(2)) == 9
    assert steps_needed([4] * 8, 4) == 8
