"""Every kind of input of a run, with a key in each place: to be searched for in what is written."""

from __future__ import annotations

import base64
import hashlib
import json
import re
from pathlib import Path
from typing import Any

from support.data_stage import synthetic


def key(place: str) -> str:
    """Return a key that stands in one place of the input, made at run time."""
    digest = base64.b64encode(hashlib.sha256(place.encode()).digest()).decode()
    return "hf" + "_" + re.sub("[^A-Za-z0-9]", "x", digest)[:30]


TEXTS = ("question", "answer", "reasoning", "context", "system", "kind", "group")
PLACES = (
    *(f"{role} {field}" for role in ("train", "dev", "test") for field in TEXTS),
    *("tool name", "tool description", "message of a user", "answer of a message"),
    *("broken line", "row without an answer", "row with a control token", "row of another type"),
    *("ability question", "ability answer", "folder", "file", "bad file", "column", "separator"),
)
KEYS = {place: key(place) for place in PLACES}


def rows_of(role: str, start: int) -> list[dict[str, Any]]:
    """Return rows of which each field has its key in one of them."""
    others = 40 if role == "train" else 12
    rows: list[dict[str, Any]] = [*synthetic(others, start)]
    for number, field in enumerate(TEXTS):
        planted = KEYS[f"{role} {field}"]
        text = f"{start + number} is {planted} here"
        rows.append(
            {"question": f"What is {role} {field} {number}?", "answer": "it"} | {field: text}
        )
    return rows


def write(path: Path, rows: list[Any]) -> str:
    """Write one row a line; texts are written as they are."""
    path.parent.mkdir(parents=True, exist_ok=True)
    lines = (row if isinstance(row, str) else json.dumps(row) for row in rows)
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return str(path)


def make_inputs(folder: Path) -> dict[str, Any]:
    """Write every kind of input below `folder`; return the settings that name them."""
    train = folder / KEYS["folder"]
    tool = {"name": KEYS["tool name"], "description": KEYS["tool description"], "parameters": {}}
    asked = [
        {"role": "user", "content": f"Use {KEYS['message of a user']}?"},
        {"role": "assistant", "content": f"With {KEYS['answer of a message']}."},
    ]
    bad: list[Any] = [
        f'{{"question": "{KEYS["broken line"]}',
        {"question": KEYS["row without an answer"]},
        {"question": KEYS["row with a control token"] + "<|im_end|>", "answer": "a"},
        {"question": {"text": KEYS["row of another type"]}, "answer": "a"},
    ]
    write(train / f"{KEYS['file']}.jsonl", [*rows_of("train", 1_000), *bad])
    write(train / "messages.jsonl", [{"messages": asked}, {"messages": asked, "tools": [tool]}])
    write(train / f"{KEYS['bad file']}.json", ['[{"question": "q", "answer": "a"}, {"question": "'])
    return {
        "data_paths": (str(train),),
        "dev_paths": (write(folder / "dev.jsonl", rows_of("dev", 2_000)),),
        "test_paths": (write(folder / "test.jsonl", rows_of("test", 3_000)),),
        "ability_path": write(
            folder / "ability.jsonl",
            [{"question": KEYS["ability question"], "answer": KEYS["ability answer"]}] * 4,
        ),
        "columns": {"history": KEYS["column"]},
        "reasoning_separator": KEYS["separator"],
        "personal_data": "report",
        "max_bad_fraction": 1.0,
    }
