"""Keys in every field of every input of a run: no page, log, journal or database has one."""

from __future__ import annotations

import base64
import hashlib
import json
import re
import sqlite3
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
from support.data_stage import synthetic
from support.flow_project import FlowProject


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

KEEPS_IT = {
    r"cache/datasets/\w+/(train|dev)\.arrow": "tokens to train on, with the text of their question",
    r"cache/datasets/\w+/test\.jsonl": "questions that the models are asked",
    r"cache/answers/.*": "answers of the base model to them, to be scored",
    r"runs/[^/]+/jobs/inference/answers\.jsonl": "answers, to be scored and judged",
    r"runs/[^/]+/jobs/inference/outcome\.json": "a few of them, which the card shows masked",
}
"""Files of the run that hold rows as they are, with the reason; only their owner can read them."""

SETTINGS = {"folder", "file", "bad file", "column", "separator"}
"""Places whose keys are part of a setting or path: what a run needs to be continued holds them."""

KEEPS_SETTINGS = {
    r"runs/[^/]+/config\.json": "the settings, to resume the run",
    r"runs/[^/]+/(jobs|attempts)/\w+/plan\.json": "the request to a worker",
    r"cache/digests\S*": "digests by path",
    r"\.qwen3ft/prefect/prefect\.db:flow_run": "the parameters of the run, to start it again",
}


def rows_of(role: str, start: int) -> list[dict[str, Any]]:
    """Return rows of which each field has its key in one of them."""
    rows: list[dict[str, Any]] = [*synthetic(40, start)]
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


def texts_below(folder: Path) -> Iterator[tuple[str, str]]:
    """Yield (name, content) of each file below `folder`, and of each table of each database."""
    for path in sorted(folder.rglob("*")):
        if path.is_symlink() or not path.is_file() or path.name.endswith(("-wal", "-shm")):
            continue  # a database is read with what its log holds
        name = path.relative_to(folder).as_posix()
        if path.read_bytes()[:15] == b"SQLite format 3":
            with closing(sqlite3.connect(f"file:{path}?mode=ro", uri=True)) as database:
                database.text_factory = lambda content: content.decode("utf-8", "replace")
                tables = database.execute("select name from sqlite_master where type = 'table'")
                for (table,) in tables.fetchall():
                    rows = database.execute(f'select * from "{table}"').fetchall()
                    yield f"{name}:{table}", "\n".join(map(str, rows))
        else:
            yield name, path.read_bytes().decode("utf-8", "replace")


def test_a_key_in_any_input_of_a_run_reaches_no_output(
    project: FlowProject, cache_dir: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """Each place of the input has a key of its own; whatever was written is searched for all."""
    inputs, root = project.root / "inputs", project.root
    before = set(texts_below(root)) if inputs.exists() else set()
    (root / "cache").mkdir()
    (root / "cache" / "models").symlink_to(cache_dir / "models")  # quantised by another test
    state, run = project.run(
        **make_inputs(inputs),
        cache_dir=str(root / "cache"),
        max_sequence_length=512,
        max_steps=2,
        inference_rows=60,
        max_new_tokens=4,
    )
    assert state.is_completed(), state.message
    printed = "".join(capfd.readouterr())
    found: dict[str, set[str]] = {}
    for name, content in [*texts_below(root), ("the terminal", printed)]:
        if name.startswith("inputs/") or (name, content) in before:
            continue
        leaked = {place for place, planted in KEYS.items() if planted in content}
        if any(re.fullmatch(pattern, name) for pattern in KEEPS_IT):
            leaked = set()
        if any(re.fullmatch(pattern, name) for pattern in KEEPS_SETTINGS):
            leaked -= SETTINGS
        if leaked:
            found[name] = leaked
    assert found == {}
    assert run.path.is_dir()
