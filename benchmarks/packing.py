"""How full packed micro-batches are, and what planning them costs; nothing is trained.

    python benchmarks/packing.py [--steps 1000] [--sequence 256] [--effective 64] [--out FILE]

Lengths are those of the workload that the peers were measured with: lognormal, median 0.375 x the
longest, sigma 0.6, clipped to 16 and the longest. For each capacity in tokens of a micro-batch: how
many micro-batches a step takes, and which share of their slots holds real tokens; the padded twin
has capacity / longest rows a micro-batch, rows of like length together. Planning is timed for all
steps, order included. Exits with 1 if a packed share is under 98 %.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import platform
import random
import sys
import time
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from qwen3ft.planning.packing import (  # noqa: E402
    epoch_batches,
    epoch_order,
    row_tokens,
    rows_at_a_time,
    worst_case,
)

CAPACITIES = (1024, 2048, 4096, 8192, 16384)
REAL_AT_LEAST = 0.98


def workload_lengths(count: int, longest: int, seed: int = 0) -> list[int]:
    """Tokens of each sequence."""
    draw = random.Random(seed)
    median = math.log(longest * 0.375)
    return [int(min(longest, max(16, draw.lognormvariate(median, 0.6)))) for _ in range(count)]


def packed(lengths: np.ndarray, effective: int, capacity: int) -> dict[str, Any]:
    """Micro-batches, slots and seconds of one epoch."""
    started = time.perf_counter()
    steps = list(epoch_batches(lengths, effective, capacity, seed=0, epoch=0))
    seconds = time.perf_counter() - started
    slots = sum(
        row_tokens(int(lengths[rows].sum())) for micro_batches in steps for rows in micro_batches
    )
    worst = worst_case(lengths, steps)
    return {
        "micro_batches_per_step": worst.micro_batches / len(steps),
        "most_micro_batches": worst.micro_batches_per_step,
        "fullest_row_tokens": worst.row_tokens,
        "real_share": int(lengths.sum()) / slots,
        "planning_seconds_per_1000_steps": 1000 * seconds / len(steps),
    }


def padded(lengths: np.ndarray, effective: int, rows_each: int) -> dict[str, Any]:
    """The same for padded rows."""
    micro_batches = slots = steps = 0
    for batch in epoch_order(lengths, effective, seed=0, epoch=0):
        groups = [lengths[batch[group]] for group in rows_at_a_time(batch, rows_each)]
        micro_batches += len(groups)
        slots += sum(len(group) * int(group.max()) for group in groups)
        steps += 1
    return {
        "micro_batches_per_step": micro_batches / steps,
        "real_share": int(lengths.sum()) / slots,
    }


def main(arguments: Sequence[str] | None = None) -> int:
    """Print the table; 1 if a bar is missed."""
    parser = argparse.ArgumentParser(description=__doc__, add_help=True)
    parser.add_argument("--steps", type=int, default=1000)
    parser.add_argument("--sequence", type=int, default=256)
    parser.add_argument("--effective", type=int, default=64)
    parser.add_argument("--out", type=Path)
    asked = parser.parse_args(arguments)
    lengths = np.asarray(workload_lengths(asked.steps * asked.effective, asked.sequence))
    print(f"{asked.steps} steps of {asked.effective} sequences, {lengths.mean():.0f} tokens each")
    print("            packed                                         padded")
    print("capacity    micro/step  real     fullest  plan 1,000 steps  micro/step  real")
    results = []
    for capacity in CAPACITIES:
        one = packed(lengths, asked.effective, capacity)
        other = padded(lengths, asked.effective, max(1, capacity // asked.sequence))
        results.append({"capacity_tokens": capacity, "packed": one, "padded": other})
        print(
            f"{capacity:8,}  {one['micro_batches_per_step']:12.2f}  {one['real_share']:6.2%}"
            f"  {one['fullest_row_tokens']:7,}  {one['planning_seconds_per_1000_steps']:14.3f} s"
            f"  {other['micro_batches_per_step']:10.2f}  {other['real_share']:6.2%}"
        )
    if asked.out:
        machine = {"machine": platform.processor(), "cpus": os.cpu_count()}
        made = {"date": datetime.now(UTC).date().isoformat(), **machine, "results": results}
        asked.out.write_text(json.dumps(made, indent=1) + "\n", encoding="utf-8")
    missed = [r["capacity_tokens"] for r in results if r["packed"]["real_share"] < REAL_AT_LEAST]
    if missed:
        print(f"under {REAL_AT_LEAST:.0%} real tokens at capacities {missed}", file=sys.stderr)
    return 1 if missed else 0


if __name__ == "__main__":
    sys.exit(main())
