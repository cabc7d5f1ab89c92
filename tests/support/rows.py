"""Rows of a file that holds given values, for tests of reading."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from qwen3ft.config import ColumnNames
from qwen3ft.data.rows import RowCounts, RowRules, read_file
from qwen3ft.records.data import BadRow, QaRow, SourceFile

GOOD = {"question": "Which day?", "answer": "Friday"}


def read(path: Path, rules: RowRules = RowRules(), **columns: str) -> list[QaRow | BadRow]:  # noqa: B008
    """Return all rows of a file, with columns set by `columns`."""
    if columns:
        rules = RowRules(ColumnNames(**columns))
    return list(read_file(SourceFile(str(path), path, "train"), rules, RowCounts()))


def read_line(folder: Path, line: bytes, rules: RowRules = RowRules()) -> QaRow | BadRow:  # noqa: B008
    """Return the row of a file that holds `line`."""
    path = folder / "one.jsonl"
    path.write_bytes(line)
    [row] = read(path, rules)
    return row


def read_values(folder: Path, values: dict[str, Any], rules: RowRules = RowRules()) -> QaRow:  # noqa: B008
    """Return the good row made of `values`."""
    row = read_line(folder, json.dumps(values, ensure_ascii=False).encode(), rules)
    assert not isinstance(row, BadRow), row
    return row


def read_counted(folder: Path, values: dict[str, Any]) -> tuple[QaRow, RowCounts]:
    """Return the good row made of `values`, and the counts of how it was read."""
    path, counts = folder / "one.jsonl", RowCounts()
    path.write_text(json.dumps(values), encoding="utf-8")
    [row] = read_file(SourceFile(str(path), path, "train"), RowRules(), counts)
    assert not isinstance(row, BadRow), row
    return row, counts
