"""Hostile data files, opened as `qwen3ft data check` does."""

from __future__ import annotations

from pathlib import Path

from benchmarks.hostile.case import Case


def read_rows(inside: Path) -> str:
    """Read every file of `inside` as a run's data; return what became of the bad rows."""
    from collections import Counter

    from qwen3ft.data.columns import Columns
    from qwen3ft.data.rows import RowRules, read_file
    from qwen3ft.data.safety import scan
    from qwen3ft.records.data import BadRow, SourceFile

    refused: Counter[str] = Counter()
    used: Counter[Columns] = Counter()
    for path in sorted(inside.iterdir()):
        for row in read_file(SourceFile(str(path), path, "train"), RowRules(), used):
            if isinstance(row, BadRow):
                refused[row.reason] += 1
            else:
                scan(row["question"] + row["answer"])
    return ", ".join(f"{reason} {count}" for reason, count in refused.items())


def _nested_objects(inside: Path) -> None:
    deep = '{"a":' * 20_000 + "1" + "}" * 20_000
    (inside / "rows.json").write_text(f'[{{"question": "q", "answer": "a"}}, {deep}]')


CASES = (Case("json-nested-objects", "data", _nested_objects, read_rows),)
