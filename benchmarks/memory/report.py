"""Errors, verdicts and tables: `python -m benchmarks.memory.report results.json ...`."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

TOLERANCE = 0.05
"""Relative error of a prediction that counts as right."""
WITHIN = 0.95
"""Share of the cases whose prediction must be right."""
UNDERESTIMATE = 0.03
"""Largest share of the measured peak by which any prediction may be too small."""
FEWEST_CASES = 24
LEAST_RESERVED_GB = 2.95
GROWTH = 0.05
NONE = "–"


def error_of(row: dict[str, Any]) -> float:
    """Return (predicted - measured) / measured; positive if too much was predicted."""
    measured = measured_gb(row)
    return float((row["predicted_gb"] - measured) / measured)


def measured_gb(row: dict[str, Any]) -> float:
    """Return NVML's peak, or the process's own count if NVML showed none."""
    return float(row["nvml_gb"] or row["process_gb"])


def verdicts(results: dict[str, Any]) -> dict[str, bool]:
    """Return every criterion that the results can be checked against, and whether it holds."""
    answers: dict[str, bool] = {}
    if cases := [row for row in results["matrix"] if row["status"] == "ok"]:
        errors = [error_of(row) for row in cases]
        within = sum(abs(error) <= TOLERANCE for error in errors)
        answers[f"matrix: {FEWEST_CASES} cases or more"] = len(cases) >= FEWEST_CASES
        answers[f"matrix: {within} of {len(cases)} predictions within 5 %"] = (
            within >= WITHIN * len(cases)
        )
        answers[f"matrix: no prediction more than 3 % too small ({min(errors):+.1%})"] = (
            min(errors) >= -UNDERESTIMATE
        )
    if caps := results["caps"]:
        trained = [row for row in caps if row["status"] == "ok"]
        answers["caps: each trains or is refused"] = all(
            row["status"] in ("ok", "refused") for row in caps
        )
        answers["caps: NVML never above the cap"] = all(
            row["nvml_peak_gb"] <= row["cap_gb"] for row in trained
        )
    ours = [row for row in results["least"] if row["contestant"] == "ours"]
    if ours:
        reserved = ours[0].get("peak_reserved_gb")
        answers[f"least: at most {LEAST_RESERVED_GB} GB reserved"] = (
            reserved is not None and reserved <= LEAST_RESERVED_GB
        )
    return answers


def grown(results: dict[str, Any], baseline: dict[str, Any]) -> list[str]:
    """Return a line per case that needs 5 % more than in `baseline`, and the part that grew."""
    before = {row["case"]: row for row in baseline["matrix"] if row["status"] == "ok"}
    problems = []
    for row in results["matrix"]:
        old = before.get(row["case"])
        if old is None:
            continue
        if row["status"] != "ok":
            problems.append(f"{row['case']}: {row['status']}; it fitted before")
            continue
        now, then = measured_gb(row), measured_gb(old)
        if now > (1 + GROWTH) * then:
            problems.append(f"{row['case']}: {now:.2f} GB, before {then:.2f}; {_largest(row, old)}")
    return problems


def _largest(row: dict[str, Any], old: dict[str, Any]) -> str:
    """Name the predicted part that grew most."""
    growth = {part: size - old["parts_gb"].get(part, 0.0) for part, size in row["parts_gb"].items()}
    part = max(growth, key=growth.__getitem__)
    return f"most of it in: {part}, {growth[part]:+.2f} GB predicted"


def report(results: dict[str, Any]) -> str:
    """Return all results as tables: memory in GB (2**30 bytes)."""
    machine = results["machine"]
    versions = ", ".join(f"{name} {is_}" for name, is_ in machine["versions"].items() if is_)
    text = [f"\n{machine['date']}  {machine['gpu']}, driver {machine['driver']}", versions]
    if results["matrix"]:
        text += ["", *_table(_HEADER, [_matrix_line(row) for row in results["matrix"]])]
    if rows := [*results["caps"], *results["least"]]:
        text += ["", *_table(_CAPS_HEADER, [_caps_line(row) for row in rows])]
    text += [
        "",
        *(f"{name}: {'yes' if holds else 'no'}" for name, holds in verdicts(results).items()),
    ]
    text += [f"failed: {what}: {why}" for what, why in results["failed"].items()]
    return "\n".join(text)


_HEADER = ("case", "predicted", "NVML", "process", "reserved", "allocated", "off by", "s")
_CAPS_HEADER = ("case", "contestant", "outcome", "NVML", "reserved", "allocated", "tok/s")


def _matrix_line(row: dict[str, Any]) -> tuple[str, ...]:
    if row["status"] != "ok":
        need = f", needs {row['need_gb']:.2f} GB" if "need_gb" in row else ""
        return (row["case"], row["status"] + need)
    peaks = (row["predicted_gb"], *(row[f"{name}_gb"] for name in _MEASURED))
    numbers = (f"{peak:.2f}" for peak in peaks)
    return (row["case"], *numbers, f"{error_of(row):+.1%}", f"{row['seconds']:.0f}")


_MEASURED = ("nvml", "process", "reserved", "allocated")


def _caps_line(row: dict[str, Any]) -> tuple[str, ...]:
    head = (row["case"], row["contestant"])
    if row["status"] != "ok":
        return (*head, f"{row['status']}: {row['detail'][:90]}")
    return (
        *head,
        "trained",
        *(_number(row[name], ".2f") for name in ("nvml_peak_gb", "peak_reserved_gb")),
        _number(row["peak_allocated_gb"], ".2f"),
        f"{row['tokens_per_second']:,.0f}",
    )


def _table(header: tuple[str, ...], lines: list[tuple[str, ...]]) -> list[str]:
    whole = [header, *(line for line in lines if len(line) == len(header))]
    widths = [max(len(line[column]) for line in whole) for column in range(len(header))]
    widths[0] = max(len(line[0]) for line in [header, *lines])
    text = []
    for line in [header, *lines]:
        cells = [
            f"{cell:<{width}}" if column == 0 or len(line) < len(header) else f"{cell:>{width}}"
            for column, (cell, width) in enumerate(zip(line, widths, strict=False))
        ]
        text.append("  ".join(cells).rstrip())
    return text


def _number(value: float | None, form: str) -> str:
    return NONE if value is None else format(value, form)


if __name__ == "__main__":
    for argument in sys.argv[1:]:
        print(report(json.loads(Path(argument).read_text(encoding="utf-8"))))
