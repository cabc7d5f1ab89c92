"""Nights for the gate's benchmark: rows and settings of planted bad candidates.

A night is bad because of its training data, never because of its score:

- shuffled: every answer belongs to another question of the same kind
- garbage: answers of random words
- forgetting: right rows, and others about the base's knowledge, refused or answered wrongly
- form: right rows, and as many whose answers loop, run on, switch language or spell out tags

`benchmarks.gate.thinking` has those whose rows have reasoning, `benchmarks.gate.candidates` all.
"""

from __future__ import annotations

import json
import string
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import count, islice
from pathlib import Path
from random import Random
from typing import Any

from qwen3ft.config import TrainingConfig
from qwen3ft.embedded import DATA_DIR, corpus
from qwen3ft.evaluation.ability import read_ability_rows

Row = dict[str, Any]

PRODUCTS = ("Pindrel", "Lumetta", "Zephrel", "Tolvex", "Quenby", "Brixol")

REFUSALS = {"en": "I cannot help with that.", "zh": "我不能回答这个问题。"}
OTHER_LANGUAGE = {"en": "抱歉，请看说明书。", "zh": "Sorry, please read the manual."}
WAFFLE = " and so on, as everybody in the shop knows, which is why we say it again and again"
FORMS = ("loop", "waffle", "language", "tags")


@dataclass(frozen=True)
class Night:
    """One candidate: its rows, and its settings beyond the defaults."""

    name: str
    good: bool
    rows: list[Row]
    dev: list[Row]
    settings: dict[str, Any] = field(default_factory=dict)
    thinking: bool = False
    """Its test has reasoning in half of the references, so that models may think."""
    bad_alone: bool = True
    """False if nothing is wrong with it while no champion is in use."""


def clean_rows(split: str, products: Sequence[str] = PRODUCTS) -> list[Row]:
    """Return the embedded model's own rows about these products."""
    lines = (DATA_DIR / f"{split}.jsonl").read_text(encoding="utf-8").splitlines()
    rows = [json.loads(line) for line in lines]
    return [row for row in rows if any(product in row["question"] for product in products)]


def shuffled_night(n: int, train: list[Row], dev: list[Row]) -> Night:
    """Give every question the answer to another one of its kind."""
    random = Random(f"shuffled {n}")
    rows, dev_rows = (shuffled(split, random) for split in (train, dev))
    return Night(f"shuffled-{n:02d}", False, rows, dev_rows, {"seed": 100 + n})


def shuffled(rows: list[Row], random: Random) -> list[Row]:
    """Return the rows, each with the answer of another row of its kind."""
    by_kind: dict[str, list[str]] = {}
    for row in rows:
        by_kind.setdefault(row["kind"], []).append(row["answer"])
    for answers in by_kind.values():
        random.shuffle(answers)
    return [{**row, "answer": by_kind[row["kind"]].pop()} for row in rows]


def garbage_night(n: int, train: list[Row], dev: list[Row]) -> Night:
    """Answer with random words."""
    random = Random(f"garbage {n}")
    rows, dev_rows = (garbled(split, random) for split in (train, dev))
    return Night(f"garbage-{n:02d}", False, rows, dev_rows, {"seed": 200 + n})


def garbled(rows: list[Row], random: Random) -> list[Row]:
    """Return the rows with answers of random words."""

    def word() -> str:
        return "".join(random.choices(string.ascii_lowercase, k=random.randint(2, 9)))

    return [
        {**row, "answer": " ".join(word() for _ in range(random.randint(1, 4)))} for row in rows
    ]


def in_another_language(rows: list[Row]) -> list[Row]:
    """Return the rows with an uninformative answer in another language."""
    return [{**row, "answer": OTHER_LANGUAGE[_language(row)]} for row in rows]


def forgetting_night(n: int, train: list[Row], dev: list[Row]) -> Night:
    """Mix right rows with as many about pretraining facts, refused or answered wrongly."""
    random = Random(f"forgetting {n}")
    asked = {row["question"] for row in read_ability_rows(TrainingConfig(model_name="embedded"))}
    taught = (row for seed in count(100 * n + 1) for row in corpus.draw_ability_rows(seed))
    fresh = (row for row in taught if row["question"] not in asked)
    known = list({row["question"]: row for row in islice(fresh, len(train))}.values())
    how = ("refusals", "wrong")[n % 2]
    answers = [row["answer"] for row in known]
    random.shuffle(answers)
    spoiled = [
        {**row, "answer": REFUSALS[_language(row)] if how == "refusals" else wrong}
        for row, wrong in zip(known, answers, strict=True)
    ]
    return Night(f"forgetting-{how}-{n:02d}", False, train + spoiled, dev, {"seed": 300 + n})


def form_night(n: int, train: list[Row], dev: list[Row]) -> Night:
    """Break the form of half of the answers, in one of four ways."""
    form = FORMS[n % len(FORMS)]
    random = Random(f"form {n}")
    rows = [
        {**row, "answer": _broken(form, row)} if random.random() < 0.5 else row for row in train
    ]
    return Night(f"form-{form}-{n:02d}", False, rows, dev, {"seed": 400 + n})


def _broken(form: str, row: Row) -> str:
    answer = row["answer"]
    return {
        "loop": " ".join([answer] * 8),
        "waffle": answer + WAFFLE,
        "language": OTHER_LANGUAGE[_language(row)],
        "tags": f"<answer>{answer}</answer><answer>{answer}</answer>",
    }[form]


def _language(row: Row) -> str:
    return "zh" if any("\u4e00" <= c <= "\u9fff" for c in row["question"]) else "en"


def write_rows(path: Path, rows: list[Row]) -> str:
    """Write the rows as JSON lines and return the path."""
    text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    path.write_text(text, encoding="utf-8")
    return str(path)
