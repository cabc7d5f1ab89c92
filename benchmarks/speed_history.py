"""The page of all speed results: `python benchmarks/speed_history.py` writes speed-history.md.

One row for each contestant of each `results/speed-*.json`, newest first, and the floor of the same
run beside it.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

FOLDER = Path(__file__).resolve().parent
PAGE = FOLDER / "speed-history.md"
_COLUMNS = (
    *("date (UTC)", "GPU", "case", "contestant", "tok/s", "s a step", "allocated", "NVML"),
    *("first step after", "of floor"),
)
_HEADER = f"""# Speed: every measurement kept

Made by `python benchmarks/speed_history.py` from `results/speed-*.json`, which `speed.py` wrote;
what changed in between is in [speed-log.md](speed-log.md). Real tokens, steady state; memory in GB
(2**30 bytes); "of floor": of the indispensable kernels on the same card in the same run, nothing
recomputed.

| {" | ".join(_COLUMNS)} |
|{"---|" * len(_COLUMNS)}
"""


def history(results: list[dict[str, Any]]) -> str:
    """The page of `results`, as `speed.py` writes them."""
    lines = [
        (row["date"], _line(row, result))
        for result in results
        for row in result["rows"]
        if row["status"] == "ok"
    ]
    return _HEADER + "".join(line for _, line in sorted(lines, reverse=True))


def _line(row: dict[str, Any], result: dict[str, Any]) -> str:
    floor = result["cases"][row["case"]]["floor"]
    limit = floor["nothing_recomputed_tokens_per_second"] if floor else None
    cells = (
        row["date"][:16].replace("T", " "),
        result["machine"]["gpu"] or "none",
        row["case"],
        f"{row['contestant']}, {row['settings']}",
        f"{row['tokens_per_second']:,.0f}",
        f"{row['seconds_per_step']:.3f}",
        _number(row["peak_allocated_gb"], ".2f"),
        _number(row["nvml_peak_gb"], ".2f"),
        f"{row['first_step_seconds']:.0f} s",
        _number(row["tokens_per_second"] / limit if limit else None, ".0%"),
    )
    return "| " + " | ".join(cells) + " |\n"


def _number(value: float | None, form: str) -> str:
    return "–" if value is None else format(value, form)


def main() -> None:
    """Write the page."""
    paths = sorted(FOLDER.glob("results/speed-*.json"))
    results = [json.loads(path.read_text(encoding="utf-8")) for path in paths]
    PAGE.write_text(history(results), encoding="utf-8")


if __name__ == "__main__":
    main()
