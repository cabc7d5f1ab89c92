"""No value in a row raises, wherever it stands and whatever it is."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from random import Random
from typing import Any

import pytest

from qwen3ft.data.readers.raw import RawRow
from qwen3ft.data.rows import RowCounts, RowRules, _RowReader
from qwen3ft.records.data import SourceFile

CALL = {"id": "1", "type": "function", "function": {"name": "f", "arguments": '{"a": 1}'}}
TOOL = {"type": "function", "function": {"name": "f", "parameters": {"type": "object"}}}
CHAT = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": [{"type": "text", "text": "Who?"}]},
    {"role": "assistant", "reasoning_content": "ask", "content": "", "tool_calls": [CALL]},
    {"role": "tool", "content": "[1]"},
    {"from": "gpt", "value": "<think>so</think>It.", "weight": 1},
]
BLOCKS = [
    {"role": "user", "content": [{"type": "text", "text": "Who?"}]},
    {
        "role": "assistant",
        "content": [
            {"type": "thinking", "thinking": "ask"},
            {"type": "tool_use", "name": "f", "input": {"a": 1}},
        ],
    },
    {"role": "user", "content": [{"type": "tool_result", "content": [{"text": "[1]"}]}]},
    {"role": "assistant", "content": '<tool_call>{"name": "f", "arguments": {}}</tool_call>'},
]
SHORT = CHAT[1::3]
SOUND: tuple[dict[str, Any], ...] = (
    {"messages": CHAT, "tools": [TOOL], "kind": "k", "group": 1, "split": "train", "label": True},
    {"messages": BLOCKS, "tools": [{"name": "f", "input_schema": {}}], "context": "c"},
    {"conversations": [{"human": "Who?", "assistant": "It."}], "system": [{"text": "Brief."}]},
    {"prompt": SHORT[:1], "completion": SHORT[1:]},
    {"prompt": "Who?", "chosen": SHORT, "rejected": SHORT},
    {"messages": SHORT[:1], "chosen": SHORT[1:], "images": []},
    {
        "instruction": "Who?",
        "input": "He.",
        "output": "It.",
        "reasoning": ["so"],
        "history": [["And?", "No."]],
        "system": "Be brief.",
    },
    {"question": "Who?", "context": "c", "answers": {"text": ["It."], "answer_start": [0]}},
    {"question": "Who?", "answer": [{"name": "f", "arguments": {}}], "tools": json.dumps([TOOL])},
)
"""Rows of every layout, with each part that one can have."""

ODD: tuple[Any, ...] = (
    *("", " ", "x", "user", "assistant", "tool_call", "on", "null", "5", "[1]", "[[", "{}"),
    *('{"name": 1}', '[["a"]]', "<think>", "<tool_call>1</tool_call>", "\ud800", "\0"),
    *(None, True, False, 0, 5, 0.5, float("nan"), 10**400, b"x"),
    *([], [None], ["x"], [[]], [{}], {}, {"function": {}}, {"name": []}, {"role": []}),
)
"""Values of every kind, and texts that a reader takes for something else."""


def with_one_value_replaced(value: Any, odd: Any) -> Iterator[Any]:
    """Yield `value` with `odd` in the place of each value within it, one at a time."""
    yield odd
    if isinstance(value, dict):
        for key, inner in value.items():
            yield from ({**value, key: other} for other in with_one_value_replaced(inner, odd))
    elif isinstance(value, list):
        for at, inner in enumerate(value):
            for other in with_one_value_replaced(inner, odd):
                yield [*value[:at], other, *value[at + 1 :]]


def rows_with(odd: Any) -> Iterator[dict[str, Any]]:
    for sound in SOUND:
        for row in with_one_value_replaced(sound, odd):
            if row is not odd:
                yield row


def raised_by(rows: Iterator[dict[str, Any]]) -> dict[str, str]:
    """Read `rows`; return one row by each error that is raised."""
    found: dict[str, str] = {}
    reader = _RowReader(SourceFile("x", Path("x"), "train"), RowRules(), RowCounts(), [])
    for number, values in enumerate(rows, 1):
        try:
            row = reader.row(RawRow(number, values, "", "", 0))
            str(row).encode()
        except Exception as error:  # noqa: BLE001  any error is what is looked for
            found[f"{type(error).__name__}: {error}"] = repr(values)[:1000]
    return found


def test_no_value_in_a_row_raises() -> None:
    """Each value of rows of every layout is replaced by each odd one."""
    assert raised_by(row for odd in ODD for row in rows_with(odd)) == {}


@pytest.mark.slow  # 40,000 rows, 10 s
def test_no_two_values_in_a_row_raise() -> None:
    """Two of them at random: what replaces one may stand behind what replaces another."""
    random, rows = Random(5), list(rows_with("x"))

    def twice() -> Iterator[dict[str, Any]]:
        for _ in range(40_000):
            replaced = with_one_value_replaced(random.choice(rows), random.choice(ODD))
            row = random.choice(list(replaced))
            if isinstance(row, dict):
                yield row

    assert raised_by(twice()) == {}


def test_the_rows_that_are_made_odd_are_sound() -> None:
    reader = _RowReader(SourceFile("x", Path("x"), "train"), RowRules(), RowCounts(), [])
    rows = [reader.row(RawRow(1, values, "", "", 0)) for values in SOUND]
    assert [getattr(row, "reason", "") for row in rows] == [""] * len(SOUND), rows
