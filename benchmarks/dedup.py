"""Speed and memory of keys, repeats and near-duplicates on generated rows.

    python benchmarks/dedup.py [--rows 200000] [--out FILE]

One core, one process. A row has about 60 words of question and answer. One in fifty is held out,
one in twenty repeats an earlier row, and one in twenty is an earlier row with one word exchanged.
A text is made anew from its number whenever it is asked for, so the memory is that of the stages;
the time that making takes is measured and not counted. Prints one table with machine and date, and
exits with 1 if a planted repeat is missed, or more than one in a hundred of the planted changes.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import resource
import sys
import time
from collections.abc import Iterator
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from random import Random
from typing import Any

os.environ.setdefault("RAYON_NUM_THREADS", "1")  # read once, when rensa starts its threads

CHUNK_ROWS = 2000
LETTERS = "abcdefghijklmnopqrstuvwxyz"
WORDS = ["".join(Random(i).choices(LETTERS, k=2 + i % 8)) for i in range(20_000)]


def make_row(number: int) -> tuple[str, str]:
    """The question and the answer of a row, always the same for a number."""
    kind, source = number % 20, number
    if kind in (18, 19):
        source = number - 10 - kind % 2
    words = Random(source).choices(WORDS, k=60)
    if kind == 19:
        words[10] = "exchanged"
    return " ".join(words[:25]).capitalize() + "?", " ".join(words[25:]).capitalize() + "."


def peak_bytes() -> int:
    """The most resident memory of this process so far."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


class Stages:
    """Seconds and peak memory of each stage, in order."""

    def __init__(self, rows: int) -> None:
        self.rows = rows
        self.started_bytes = peak_bytes()
        self.found: dict[str, dict[str, float]] = {}

    def note(self, name: str, seconds: float) -> None:
        """Keep what a stage took."""
        extra = (peak_bytes() - self.started_bytes) / 1e6
        speed = self.rows / seconds
        self.found[name] = {
            "seconds": round(seconds, 2),
            "rows_per_second": round(speed),
            "peak_extra_mb": round(extra),
        }
        print(f"{name:<10} {seconds:9.2f} s {speed:12,.0f} rows/s {extra:8,.0f} MB", flush=True)


def chunks(rows: int) -> Iterator[list[tuple[str, str]]]:
    """All rows, some at a time."""
    for start in range(0, rows, CHUNK_ROWS):
        yield [make_row(i) for i in range(start, min(start + CHUNK_ROWS, rows))]


def measure(rows: int) -> dict[str, Any]:
    """Run the stages one after the other; what they took and found."""
    from qwen3ft.data.near_duplicates import NearDuplicates, as_text
    from qwen3ft.data.splits import (
        DUPLICATE,
        KEPT,
        TRAIN,
        KeysBuilder,
        content_key,
        find_repeats,
        hold_out,
        leaks,
        question_key,
    )

    stages = Stages(rows)
    builder, near = KeysBuilder(), NearDuplicates()
    seconds = {"keys": 0.0, "signatures": 0.0}
    for part in chunks(rows):
        started = time.perf_counter()
        for question, answer in part:
            builder.append(question_key(question), content_key(question, answer), "train", 0)
        keyed = time.perf_counter()
        near.add([as_text(*row) for row in part])
        seconds["keys"] += keyed - started
        seconds["signatures"] += time.perf_counter() - keyed
    for name, taken in seconds.items():
        stages.note(name, taken)

    started = time.perf_counter()
    keys = builder.build()
    reasons = find_repeats(keys)
    kept = reasons == KEPT
    roles = hold_out(keys, kept, 0.02, ["test"])
    kept &= ~leaks(keys, roles, kept)
    stages.note("repeats", time.perf_counter() - started)

    reading = 0.0

    def text_of(row: int) -> str:
        nonlocal reading
        began = time.perf_counter()
        text = as_text(*make_row(row))
        reading += time.perf_counter() - began
        return text

    started = time.perf_counter()
    training, held_out = kept & (roles == TRAIN), kept & (roles != TRAIN)
    leaked = near.find(training, held_out, text_of)
    training[leaked] = False
    repeated = near.find(training, training, text_of)
    stages.note("pairs", time.perf_counter() - started - reading)
    total = sum(stage["seconds"] for stage in stages.found.values())
    stages.note("all", total)
    return {
        "stages": stages.found,
        "planted": {"duplicates": rows // 20, "near": rows // 20},
        "found": {
            "duplicates": int((reasons == DUPLICATE).sum()),
            "near_held_out": len(leaked),
            "near_in_training": len(repeated),
            "verified": near.verified,
            "capped_buckets": near.capped_buckets,
        },
    }


def main() -> None:
    """Measure, print, write."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rows", type=int, default=200_000)
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    machine = (
        f"{platform.machine()}, {os.cpu_count()} CPU cores, Python {platform.python_version()}"
    )
    libraries = {name: version(name) for name in ("numpy", "rensa")}
    print(f"{datetime.now(UTC):%Y-%m-%d}  {machine}  {libraries}  {options.rows:,} rows")
    result = {
        "date": f"{datetime.now(UTC):%Y-%m-%d}",
        "machine": machine,
        "libraries": libraries,
        "rows": options.rows,
        **measure(options.rows),
    }
    print(result["planted"], result["found"])
    if options.out:
        options.out.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    found, planted = result["found"], result["planted"]
    near = found["near_held_out"] + found["near_in_training"]
    if found["duplicates"] < planted["duplicates"] or near < 0.99 * planted["near"]:
        sys.exit("planted copies were missed")


if __name__ == "__main__":
    main()
