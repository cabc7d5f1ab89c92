"""Table of speed results: `python -m benchmarks.speed.report results.json ...`."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

NONE = "–"
_HEADER = (
    *("contestant", "settings", "tok/s", "s/step", "alloc", "reserved", "NVML"),
    *("to 1st step", "loss", "x best peer", "of floor"),
)


def report(results: dict[str, Any], ours: Sequence[str]) -> str:
    """Return all cases as a table: memory in GB (2**30 bytes), times in seconds, losses in nats."""
    machine = results["machine"]
    device = f"{machine['gpu']}, driver {machine['driver']}" if machine["gpu"] else "CPU"
    versions = ", ".join(f"{name} {is_ or NONE}" for name, is_ in machine["versions"].items())
    table: list[Sequence[str]] = [_HEADER]
    for name, case in results["cases"].items():
        rows = [row for row in results["rows"] if row["case"] == name]
        table.append((f"{name}: {case['tokens_of_a_step']:,} tokens a step",))
        table.extend(_lines(rows, case["floor"], ours))
    whole = [line for line in table if len(line) == len(_HEADER)]
    widths = [max(len(line[column]) for line in whole) for column in range(len(_HEADER))]
    for column in (0, 1):  # a failed row has these two, then its reason
        widths[column] = max(len(line[column]) for line in table if len(line) > 1)
    text = [f"\n{machine['date']}  {device}", versions, ""]
    for line in table:
        if len(line) == 1:
            text += ["", line[0]]
            continue
        left = [f"{cell:<{width}}" for cell, width in zip(line[:2], widths, strict=False)]
        if len(line) < len(_HEADER):  # a failed row
            text.append("  ".join([*left, *line[2:]]))
            continue
        right = [f"{cell:>{width}}" for cell, width in zip(line[2:], widths[2:], strict=False)]
        text.append("  ".join([*left, *right]).rstrip())
    if not results.get("complete", False):
        text += ["", "interrupted: contestants are missing"]
    return "\n".join(text)


def _lines(
    rows: list[dict[str, Any]], floor: dict[str, Any] | None, ours: Sequence[str]
) -> list[Sequence[str]]:
    done = [row for row in rows if row["status"] == "ok"]
    peers = [row["tokens_per_second"] for row in done if row["contestant"] not in ours]
    best = max(peers, default=None)
    limit = floor["nothing_recomputed_tokens_per_second"] if floor else None
    lines: list[Sequence[str]] = []
    for row in rows:
        head = (row["contestant"], _settings(row))
        if row["status"] != "ok":
            reason = row["status"] if row["status"] != "failed" else f"failed: {row['detail']}"
            lines.append((*head, reason[:110]))
            continue
        speed = row["tokens_per_second"]
        cells = (
            f"{speed:,.0f}",
            f"{row['seconds_per_step']:.3f}",
            _number(row["peak_allocated_gb"], ".2f"),
            _number(row["peak_reserved_gb"], ".2f"),
            _number(row["nvml_peak_gb"], ".2f"),
            _number(row["first_step_seconds"], ".1f"),
            _number(row["loss"], ".4f"),
            _number(speed / best if best else None, ".2f"),
            _number(speed / limit if limit else None, ".0%"),
        )
        lines.append((*head, *cells))
    if floor:
        for what, words in (("nothing", "nothing recomputed"), ("all", "all recomputed")):
            speed = floor[f"{what}_recomputed_tokens_per_second"]
            seconds = floor[f"{what}_recomputed_ms"] / 1e3
            lines.append(("floor", words, f"{speed:,.0f}", f"{seconds:.3f}", *[NONE] * 7))
    return lines


def _settings(row: dict[str, Any]) -> str:
    """Return the settings in words; for ours, those of the plan."""
    levers = row.get("levers")
    if not levers:
        return str(row["settings"])
    words = [f"{levers['micro_batch_size']} x {levers['gradient_accumulation_steps']}"]
    words += ["packed"] if levers.get("packing") else []
    words += ["keeps all"] if levers.get("gradient_checkpointing") is False else []
    words += [levers["kernels"]] if levers.get("kernels") else []
    return ", ".join(words)


def _number(value: float | None, form: str) -> str:
    return NONE if value is None else format(value, form)


if __name__ == "__main__":
    from benchmarks.speed.cases import OURS

    for argument in sys.argv[1:]:
        print(report(json.loads(Path(argument).read_text(encoding="utf-8")), OURS))
