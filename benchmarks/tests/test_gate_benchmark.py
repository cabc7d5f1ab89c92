"""The nights of the gate's benchmark are what they are called, and the benchmark runs."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import pytest
from tokenizers import Tokenizer

from benchmarks.gate import campaign as gate
from benchmarks.gate.candidates import KNOWN_BEFORE, TAUGHT, all_nights, champion_night, questions
from benchmarks.gate.judging import QUESTIONS
from benchmarks.gate.nights import Night, clean_rows
from benchmarks.gate.thinking import THINKING_TOKENS, with_reasoning
from qwen3ft.config import TrainingConfig
from qwen3ft.embedded import MODEL_DIR
from qwen3ft.evaluation.ability import read_ability_rows

NIGHTS = all_nights(gate.GOOD, gate.BAD)
CHAMPIONS = [champion_night(thinking=thinking) for thinking in (False, True)]
WITHOUT_RIGHT_ROWS = ("shuffled", "garbage", "dropped")


def kind_of(night: Night) -> str:
    """First word of the night's name, without that it thinks."""
    return night.name.removeprefix("thinking-").partition("-")[0]


def right_share(night: Night) -> float:
    """Share of the night's rows that the clean rows have too."""
    rows = clean_rows("train", TAUGHT)
    fields = ("question", "answer", "reasoning")
    right = {
        tuple(row.get(name) for name in fields)
        for row in (with_reasoning(rows) if night.thinking else rows)
    }
    found = [tuple(row.get(name) for name in fields) in right for row in night.rows]
    return sum(found) / len(found)


def test_the_numbers_of_nights_are_those_of_the_bar() -> None:
    """20 good ones and 50 bad ones of ten kinds, many of each with thinking."""
    assert Counter(night.good for night in NIGHTS) == {True: gate.GOOD, False: gate.BAD}
    kinds = Counter((night.thinking, kind_of(night)) for night in NIGHTS if not night.good)
    assert list(kinds.values()) == [5] * 10
    assert Counter(night.thinking for night in NIGHTS if night.good) == {True: 10, False: 10}
    assert len({night.name for night in NIGHTS}) == len(NIGHTS)


def test_good_nights_are_clean_and_bad_ones_are_not() -> None:
    """By their rows; nothing about a night looks at a score."""
    for night in (*NIGHTS, *CHAMPIONS):
        share = right_share(night)
        if night.good:
            assert share == 1.0
        elif kind_of(night) in WITHOUT_RIGHT_ROWS:
            assert share < 0.5, night.name
        else:
            assert 0.3 < share < 0.8, night.name


def test_the_champions_lack_what_good_nights_add() -> None:
    """They were trained on half of the products."""
    assert len(KNOWN_BEFORE) == len(TAUGHT) / 2
    for champion in CHAMPIONS:
        assert 0.4 < len(champion.rows) / len(clean_rows("train", TAUGHT)) < 0.6


def test_a_night_asks_as_many_questions_as_by_default() -> None:
    """Each but once, and the English ones with thinking; of fewer than 360, asking never stops."""
    assert TrainingConfig(model_name="embedded").inference_rows == QUESTIONS
    for thinking in (False, True):
        rows = questions(thinking=thinking)
        assert len({row["question"] for row in rows}) == len(rows) == QUESTIONS
        thought = [row for row in rows if row.get("reasoning")]
        assert len(thought) == (sum(row["question"].isascii() for row in rows) if thinking else 0)


def test_no_night_trains_on_questions_that_are_asked_later() -> None:
    """Neither the test's nor those of the ability set."""
    asked = {row["question"] for row in questions(thinking=False)}
    asked |= {row["question"] for row in read_ability_rows(TrainingConfig(model_name="embedded"))}
    for night in (*NIGHTS, *CHAMPIONS):
        assert not asked & {row["question"] for row in (*night.rows, *night.dev)}, night.name


def test_endless_thinking_outlasts_its_budget_and_good_thinking_does_not() -> None:
    """In tokens of the embedded model."""
    tokenizer = Tokenizer.from_file(str(MODEL_DIR / "tokenizer.json"))
    rows = {night.name: night.rows for night in NIGHTS if night.thinking}
    lengths = {
        name: [len(tokenizer.encode(row["reasoning"]).ids) for row in rows[name]]
        for name in ("thinking-good-00", "thinking-endless-00")
    }
    assert max(lengths["thinking-good-00"]) <= THINKING_TOKENS / 2
    assert max(lengths["thinking-endless-00"]) > 1.5 * THINKING_TOKENS


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_the_quick_benchmark_passes(tmp_path: Path) -> None:
    """Two good and ten bad candidates, trained for real."""
    assert gate.main(["--quick", "--out", str(tmp_path / "gate.json")]) == 0
    assert (tmp_path / "gate.json").is_file()
