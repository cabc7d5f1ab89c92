"""Rows in the layouts that publishers document, compared with a reference by transformers alone.

    python -m benchmarks.layouts [--rows 40] [--only WORD] [--out FILE]

Writes rows of its own in each layout, reads and tokenises them as a run does, and compares token
ids and loss mask with a plain parser of the layout and `apply_chat_template`, for three families of
templates and a base model without one. A layout is equal, or refused with the reason it should be,
or differs. Exits with 1 if any differs, or if something of a row is lost that is not named.
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")

from benchmarks.layouts.check import LAYOUTS, Verdict, check
from benchmarks.layouts.families import families
from benchmarks.machine import machine, write_json

SHOWN_NAMES = 4


def main() -> int:
    """Compare all layouts and print the table; return 1 if one differs."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rows", type=int, default=40, help="rows of each layout")
    parser.add_argument("--only", default="", help="layouts with this in their names")
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    started = time.perf_counter()
    tokenizers = families()
    verdicts: dict[str, Verdict] = {}
    for layout in LAYOUTS:
        if arguments.only.lower() in layout.name.lower():
            with tempfile.TemporaryDirectory(prefix="qwen3ft-layouts-") as folder:
                verdicts[layout.name] = check(layout, arguments.rows, Path(folder), tokenizers)
    seconds = time.perf_counter() - started
    width = max(map(len, verdicts), default=0)
    for name, verdict in verdicts.items():
        print(f"{name:{width}}  {_line(verdict)}")
    differ = [name for name, verdict in verdicts.items() if verdict.differences]
    for name in differ:
        print(f"\n{name}:\n" + "\n".join(verdicts[name].differences[:3]))
    about = machine()
    print(
        f"\n{len(verdicts)} layouts of {arguments.rows} rows, {', '.join(tokenizers)}: "
        f"{sum(v.equal > 0 for v in verdicts.values())} equal, "
        f"{sum(not v.equal and not v.differences for v in verdicts.values())} refused, "
        f"{len(differ)} differ. {seconds:.0f} s, {about['date']}, {about['cpu_count']} cores, "
        f"transformers {about['versions']['transformers']}"
    )
    if arguments.out:
        facts: dict[str, Any] = {
            "machine": about,
            "seconds": round(seconds, 1),
            "rows": arguments.rows,
            "families": list(tokenizers),
            "layouts": {name: _facts(verdict) for name, verdict in verdicts.items()},
        }
        write_json(arguments.out, facts)
    return 1 if differ else 0


def _line(verdict: Verdict) -> str:
    parts = [f"{verdict.equal} equal"] if verdict.equal else []
    parts += [f"{rows} refused: {reason}" for reason, rows in verdict.refused.items()]
    if verdict.differences:
        parts.append("DIFFERS")
    if names := list(verdict.unused):
        more = f" and {len(names) - SHOWN_NAMES} more" if len(names) > SHOWN_NAMES else ""
        parts.append(f"not used: {', '.join(names[:SHOWN_NAMES])}{more}")
    return "; ".join(parts)


def _facts(verdict: Verdict) -> dict[str, Any]:
    return {
        "equal": verdict.equal,
        "refused": dict(verdict.refused),
        "differences": len(verdict.differences),
        "not_used": dict(verdict.unused),
        "changed": dict(verdict.changed),
    }


if __name__ == "__main__":
    sys.exit(main())
