"""No row is lost from broken files of any kind."""

from __future__ import annotations

import json
import time
from collections import Counter
from pathlib import Path
from random import Random

import pytest
from support.fuzz_files import Made, make

from qwen3ft.data.readers.open import read_raw
from qwen3ft.data.readers.raw import UnreadableFileError
from qwen3ft.data.rows import UNREADABLE_FILE, RowCounts, RowRules, read_file
from qwen3ft.records.data import BadRow, SourceFile

ROWS, ROWS_PER_FILE = 25_000, 200
MOST_SECONDS = 10.0
"""CPU time allowed for a file, which is read twice."""


def check_raw(path: Path, made: Made) -> tuple[list[str], Counter[str]]:
    """Return what is wrong with the rows of a file's reader, and their number by reason."""
    problems: list[str] = []
    reasons: Counter[str] = Counter()
    good, places = [], []
    try:
        for row in read_raw(path, list):
            reasons[row.reason or "good"] += 1
            places.append((row.offset, row.line))
            if not row.reason:
                good.append(row.values)
    except UnreadableFileError:
        reasons[UNREADABLE_FILE] += 1
    if places != sorted(places):
        problems.append("offsets and lines do not rise")
    if not made.is_counted:
        return problems, reasons
    if reasons[UNREADABLE_FILE]:
        problems.append("unreadable, though only records are broken")
    if made.slack == 0 and good != made.good:
        problems.append(f"{len(good)} good rows differ from the {len(made.good)} made")
    found, wanted = (
        Counter(json.dumps(row, sort_keys=True) for row in rows) for rows in (good, made.good)
    )
    lost, added = (wanted - found).total(), (found - wanted).total()
    bad = reasons.total() - reasons["good"] - reasons[UNREADABLE_FILE]
    if max(lost, added) > made.slack or abs(bad - made.broken) > 2 * made.slack:
        problems.append(f"{lost} good rows lost, {added} added, {bad} of {made.broken} bad")
    return problems, reasons


def check_rows(path: Path, raw: Counter[str]) -> list[str]:
    """Return where `read_file` disagrees with the file's reader."""
    found: Counter[str] = Counter()
    for row in read_file(SourceFile(str(path), path, "train"), RowRules(), RowCounts()):
        is_bad = isinstance(row, BadRow)
        (row.reason + row.excerpt if is_bad else str(row)).encode()
        found[row.reason if is_bad else "good"] += 1
    if path.suffix == ".parquet" and UNREADABLE_FILE in raw:
        return []  # it reads fewer columns: the damage may be in others, or come later
    if found.total() != raw.total() or (UNREADABLE_FILE in found) != (UNREADABLE_FILE in raw):
        return [f"read_file gives {dict(found)} of {dict(raw)}"]
    return []


@pytest.mark.slow
@pytest.mark.timeout(1200)
@pytest.mark.parametrize("seed", range(4))
def test_no_row_is_lost_from_broken_files(tmp_path: Path, seed: int) -> None:
    """Reading raises only `UnreadableFileError`, and every record comes out once, good or bad."""
    violations, number, left = [], 0, ROWS
    while left > 0:
        random = Random(f"{seed}.{number}")
        count = min(left, random.choice((1, 3, ROWS_PER_FILE, ROWS_PER_FILE)))
        made = make(random, number, count)
        path = tmp_path / made.name
        path.write_bytes(made.content)
        started = time.process_time()
        problems, reasons = check_raw(path, made)
        problems += check_rows(path, reasons)
        if (seconds := time.process_time() - started) > MOST_SECONDS:
            problems.append(f"took {seconds:.1f} s")
        violations += [f"{made.name}: {problem}" for problem in problems]
        if not problems:
            path.unlink()  # a broken promise keeps its file
        number, left = number + 1, left - count
    assert violations == []
