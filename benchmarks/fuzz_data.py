"""Broken files of every kind, read by the readers and by `rows.read_file`: nothing may be lost.

    python benchmarks/fuzz_data.py --rows 100000 --seed 0

Files are made by a grammar of good and broken records, in every format and compression, then some
are damaged as files (cut short, bytes flipped, garbage put in, bytes that are no text). Checked is:
reading raises nothing but `UnreadableFileError`, no file takes more than 10 seconds, places go up,
and where only single records are damaged, every one made comes out once: the good ones as they were
made, each broken one as one bad row. Where the end of a broken one can only be guessed (arrays, and
quotes in csv that are never closed), a few good rows may be lost or added: at most one for each in
an array, and three in csv, where a quote that opens a later field may end the one never closed.
Prints counts by format and by reason and the slowest file; ends with 1 where something is violated.
The same seed makes the same files.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
import traceback
from collections import Counter, defaultdict
from pathlib import Path
from random import Random

from benchmarks.fuzz_files import Made, make
from qwen3ft.data.readers.open import read_raw
from qwen3ft.data.readers.raw import UnreadableFileError
from qwen3ft.data.rows import UNREADABLE_FILE, RowRules, read_file
from qwen3ft.data.sources import SourceFile
from qwen3ft.records.data import BadRow

MOST_SECONDS = 10.0
NO_REASONS = ("files", "records", "good", "lost", "added", UNREADABLE_FILE)
"""What is counted beside bad rows; lost and added are good rows that differ from those made."""


def check_raw(path: Path, made: Made) -> tuple[list[str], Counter[str], Counter[str]]:
    """What is wrong with what the readers give of a file, how its rows came out, what differs."""
    problems: list[str] = []
    differing: Counter[str] = Counter()
    reasons: Counter[str] = Counter()
    good, places, is_whole = [], [], True
    try:
        for row in read_raw(path, list):
            reasons[row.reason or "good"] += 1
            places.append((row.offset, row.line))
            if not row.reason:
                good.append(row.values)
    except UnreadableFileError:
        reasons[UNREADABLE_FILE] += 1
        is_whole = False
    if places != sorted(places):
        problems.append("places do not go up")
    bad = reasons.total() - reasons["good"] - reasons[UNREADABLE_FILE]
    if made.is_counted:
        if not is_whole:
            problems.append("unreadable, though only records are broken")
        if made.slack == 0 and good != made.good:
            problems.append(f"{len(good)} good rows differ from the {len(made.good)} made")
        found, wanted = (
            Counter(json.dumps(row, sort_keys=True) for row in rows) for rows in (good, made.good)
        )
        lost, added = (wanted - found).total(), (found - wanted).total()
        if max(lost, added) > made.slack or abs(bad - made.broken) > 2 * made.slack:
            problems.append(
                f"{lost} good rows lost, {added} added, {bad} bad rows of {made.broken} broken"
            )
        differing.update(lost=lost, added=added)
    return problems, reasons, differing


def check_rows(path: Path, raw: Counter[str]) -> list[str]:
    """What is wrong with the rows of a file, given how it came out of the readers."""
    found: Counter[str] = Counter()
    for row in read_file(SourceFile(str(path), path, "train"), RowRules(), Counter()):
        texts = [row.reason, row.excerpt] if isinstance(row, BadRow) else [str(row)]
        "".join(texts).encode()
        found[row.reason if isinstance(row, BadRow) else "good"] += 1
    if path.suffix == ".parquet" and UNREADABLE_FILE in raw:
        return []  # columns are chosen there: the damage may be in others, or come later
    if found.total() != raw.total() or (UNREADABLE_FILE in found) != (UNREADABLE_FILE in raw):
        return [f"read_file gives {dict(found)} of {dict(raw)}"]
    return []


def run(rows: int, seed: int, rows_per_file: int, folder: Path) -> int:
    """Make and read files until `rows` records were made; the number of violations."""
    tables: dict[str, Counter[str]] = defaultdict(Counter)
    slowest, violations, number, left = (0.0, ""), 0, 0, rows
    started = time.perf_counter()
    while left > 0:
        random = Random(f"{seed}.{number}")
        count = min(left, random.choice((1, 3, rows_per_file, rows_per_file)))
        made = make(random, number, count)
        path = folder / made.name
        path.write_bytes(made.content)
        began = time.perf_counter()
        try:
            problems, reasons, differing = check_raw(path, made)
            problems += check_rows(path, reasons)
        except Exception:  # noqa: BLE001  # any exception is a finding
            problems, reasons, differing = [traceback.format_exc()], Counter(), Counter()
        seconds = time.perf_counter() - began
        if seconds > 2 * MOST_SECONDS:  # it was read twice
            problems.append(f"took {seconds / 2:.1f} s")
        slowest = max(slowest, (seconds / 2, f"{made.name} ({len(made.content)} bytes)"))
        kind = made.name.partition(".")[2]
        tables[kind] += reasons + differing + Counter(files=1, records=count)
        for problem in problems:
            violations += 1
            print(f"VIOLATION {made.name} (seed {seed}.{number}): {problem}")
        if not problems:
            path.unlink()
        number, left = number + 1, left - count
    report(tables, slowest, violations, time.perf_counter() - started)
    return violations


def report(
    tables: dict[str, Counter[str]], slowest: tuple[float, str], violations: int, seconds: float
) -> None:
    """Print counts by format and by reason."""
    total = sum(tables.values(), Counter[str]())
    columns = ("files", "records", "good", "bad", "lost", "added", UNREADABLE_FILE)
    print(f"{'format':18}" + "".join(f"{name:>10}" for name in columns))
    for kind, counts in [*sorted(tables.items()), ("all", total)]:
        bad = counts.total() - sum(counts[name] for name in NO_REASONS)
        numbers = {**counts, "bad": bad}
        print(f"{kind:18}" + "".join(f"{numbers.get(name, 0):10}" for name in columns))
    for reason, count in total.most_common():
        if reason not in NO_REASONS:
            print(f"  {reason:22}{count:9}")
    print(f"slowest: {slowest[1]}, {slowest[0]:.2f} s; all: {seconds:.0f} s")
    print(f"{violations} violation(s)")


def main() -> int:
    """Run the campaign."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--rows", type=int, default=100_000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--rows-per-file", type=int, default=200)
    parser.add_argument("--keep", type=Path, help="Folder that files with violations stay in.")
    asked = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        folder = asked.keep or Path(temporary)
        folder.mkdir(parents=True, exist_ok=True)
        return 1 if run(asked.rows, asked.seed, asked.rows_per_file, folder) else 0


if __name__ == "__main__":
    sys.exit(main())
