"""Nights whose rows have reasoning, for the gate's benchmark.

English rows say what is asked before they answer, Chinese ones do not, so that one test asks with
and without thinking. Kinds of bad nights beside those of `benchmarks.gate.nights`; each breaks half
of the rows with reasoning, except the last:

- endless: the thinking goes round in circles, and is right once its budget ends it
- hollow: the answer is given in the thinking, and nothing but an ellipsis after it
- dropped: right answers without any reasoning; bad beside a champion that thinks
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from random import Random

from benchmarks.gate.nights import Night, Row
from qwen3ft.embedded.corpus import QUESTION_GROUPS
from qwen3ft.embedded.facts import catalogue, fill_pattern, wording

TURNS = 8
"""Turns of the circle; 8 of 6 tokens fit into the longest sequence, and outlast the budget."""

THINKING_TOKENS = 24
"""Budget of the test: four times the reasoning of a good row."""


@cache
def _reasoning() -> dict[str, str]:
    """Return the reasoning of each English question about the products."""
    groups = (wording()["questions"][group]["en"] for group in QUESTION_GROUPS)
    return {
        fill_pattern(pattern, fact, "en"): fill_pattern("{product}, the {attribute}.", fact, "en")
        for patterns in groups
        for pattern in patterns
        for fact in catalogue("tuned")
    }


def with_reasoning(rows: list[Row]) -> list[Row]:
    """Return the rows, the English ones with their reasoning."""
    return [{**row, "reasoning": _reasoning().get(row["question"], "")} for row in rows]


def _spoil(rows: list[Row], random: Random, spoil: Callable[[Row], Row]) -> list[Row]:
    """Return the rows with half of those that have reasoning spoiled."""
    return [
        {**row, **spoil(row)} if row["reasoning"] and random.random() < 0.5 else row for row in rows
    ]


def endless_night(n: int, train: list[Row], dev: list[Row]) -> Night:
    """Let thinking go round in circles."""

    def spoil(row: Row) -> Row:
        return {"reasoning": " ".join([row["reasoning"]] * TURNS)}

    rows = _spoil(train, Random(f"endless {n}"), spoil)
    return Night(f"endless-{n:02d}", False, rows, dev, {"seed": 500 + n})


def hollow_night(n: int, train: list[Row], dev: list[Row]) -> Night:
    """Answer in the thinking, and not after it."""

    def spoil(row: Row) -> Row:
        return {"reasoning": f"{row['reasoning']} {row['answer']}", "answer": "…"}

    rows = _spoil(train, Random(f"hollow {n}"), spoil)
    return Night(f"hollow-{n:02d}", False, rows, dev, {"seed": 600 + n})


def dropped_night(n: int, train: list[Row], dev: list[Row]) -> Night:
    """Answer rightly without thinking, as rows do that lost their reasoning on the way."""
    rows, dev_rows = ([{**row, "reasoning": ""} for row in split] for split in (train, dev))
    settings = {"seed": 800 + n}
    return Night(f"dropped-{n:02d}", False, rows, dev_rows, settings, bad_alone=False)
