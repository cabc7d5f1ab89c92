"""The nights of the gate's benchmark are what they are called, and the benchmark runs."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import pytest

from benchmarks.gate import campaign as gate
from benchmarks.gate.nights import Night, all_nights, champion_night, clean_rows
from qwen3ft.config import TrainingConfig
from qwen3ft.evaluation.ability import read_ability_rows

NIGHTS = all_nights(gate.GOOD, gate.BAD)


def right_share(night: Night) -> float:
    """Share of the night's rows that the clean rows have too."""
    right = {(row["question"], row["answer"]) for row in clean_rows("train")}
    rows = [(row["question"], row["answer"]) for row in night.rows]
    return sum(row in right for row in rows) / len(rows)


def test_the_numbers_of_nights_are_those_of_the_bar() -> None:
    """20 good ones and 50 bad ones of four kinds, each with a seed of its own."""
    assert Counter(night.good for night in NIGHTS) == {True: gate.GOOD, False: gate.BAD}
    kinds = Counter(night.name.partition("-")[0] for night in NIGHTS if not night.good)
    assert sorted(kinds.values()) == [12, 12, 13, 13]
    assert len({(night.name, night.settings["seed"]) for night in NIGHTS}) == len(NIGHTS)


def test_good_nights_are_clean_and_bad_ones_are_not() -> None:
    """By their rows; nothing about a night looks at a score."""
    for night in (*NIGHTS, champion_night()):
        share = right_share(night)
        kind = night.name.partition("-")[0]
        if night.good:
            assert share == 1.0
        elif kind in ("shuffled", "garbage"):
            assert share < 0.4, night.name
        else:
            assert 0.3 < share < 0.7, night.name


def test_the_champion_lacks_what_good_nights_add() -> None:
    """It was trained on half of the products."""
    assert 0.4 < len(champion_night().rows) / len(clean_rows("train")) < 0.6


def test_no_night_trains_on_questions_that_are_asked_later() -> None:
    """Neither the test's nor those of the ability set."""
    asked = {row["question"] for row in clean_rows("test")}
    asked |= {row["question"] for row in read_ability_rows(TrainingConfig(model_name="embedded"))}
    for night in NIGHTS:
        assert not asked & {row["question"] for row in (*night.rows, *night.dev)}, night.name


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_the_quick_benchmark_passes(tmp_path: Path) -> None:
    """Two good and eight bad candidates, trained for real."""
    assert gate.main(["--quick", "--out", str(tmp_path / "gate.json")]) == 0
    assert (tmp_path / "gate.json").is_file()
