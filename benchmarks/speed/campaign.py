"""qwen3ft and its peers side by side on the same workload, on one GPU.

    python -m benchmarks.speed.campaign --work DIR --out results.json
        [--suite design --suite capped] [--case 4b:256:13] [--contestants ours,trl-pack]
        [--steps 8] [--seed 0] [--timeout 240] [--append]

Each contestant trains in a fresh process: the same random-init model of an exact Qwen3 shape,
quantised once to NF4 with double quantisation, the same rows, LoRA r 6 on the seven projections.
Tokens/s count real tokens only, from the synchronised end of step 2 to that of the last step. The
cap limits torch's allocator; ours has the CUDA context within it, peers have it on top. The floor
is the time of the indispensable kernels, measured on the same GPU (`floor.py`).

A contestant that fails becomes a row that says why. The JSON is written after each contestant, so
an interrupted run keeps its rows. Suites are in `cases.py`; `--suite tiny` needs no GPU.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import signal
import sys
from collections.abc import Iterable
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from benchmarks.jobs import JobFailedError, run_job
from benchmarks.machine import machine, write_json
from benchmarks.speed.cases import (
    CONTESTANTS,
    NEEDS,
    OURS,
    SHAPES,
    SUITES,
    Case,
    Entry,
    select,
    typical_step,
)
from benchmarks.speed.report import report

CHILD = "benchmarks.speed.contestants"
PREPARE_SECONDS = 600.0


class Bench:
    """One run of the benchmark: its folder, its results, and their file."""

    def __init__(self, arguments: argparse.Namespace) -> None:
        self.arguments = arguments
        self.work: Path = arguments.work.resolve()
        self.work.mkdir(parents=True, exist_ok=True)
        self.snapshots: dict[str, dict[str, Any] | JobFailedError] = {}
        names = ("suite", "case", "contestants", "steps", "warmup", "seed", "timeout")
        self.results: dict[str, Any] = {
            "machine": machine(),
            "arguments": {name: getattr(arguments, name) for name in names},
            "models": {},
            "cases": {},
            "rows": [],
        }
        self._count = 0
        if arguments.append and arguments.out.exists():
            self._continue_from(json.loads(arguments.out.read_text(encoding="utf-8")))

    def _continue_from(self, earlier: dict[str, Any]) -> None:
        """Continue from the results of an earlier run.

        Raises:
            ValueError: Those results belong to another machine or another workload.
        """
        same = [("machine", name) for name in ("gpu", "driver", "versions")]
        same += [("arguments", name) for name in ("seed", "steps", "warmup")]
        for part, name in same:
            if earlier[part][name] != self.results[part][name]:
                raise ValueError(f"--append: the rows in {self.arguments.out} have another {name}")
        self.results |= {name: earlier[name] for name in ("models", "cases", "rows")}

    def run(self, entries: Iterable[Entry]) -> None:
        """Run each entry in turn; measure the floor before the first entry of a case."""
        for entry in entries:
            if entry.case.name not in self.results["cases"]:
                self._begin(entry.case)
            missing = [name for name in NEEDS[entry.contestant] if not _installed(name)]
            row: dict[str, Any] = entry.describe()
            try:
                if missing:
                    raise JobFailedError("not installed", ", ".join(missing))
                if entry.case.shape in SHAPES and not self.results["machine"]["gpu"]:
                    raise JobFailedError("failed", "needs a GPU")
                row |= {"status": "ok", "detail": "", **self._contestant(entry)}
            except JobFailedError as error:
                row |= {"status": error.status, "detail": error.detail}
            row["date"] = datetime.now(UTC).isoformat(timespec="seconds")
            self._replace(row)
            speed = row.get("tokens_per_second")
            outcome = f"{speed:,.0f} tok/s" if speed else f"{row['status']} {row['detail']}"
            print(f"{row['case']}: {entry.contestant} {entry.settings}: {outcome}", flush=True)
            self.write()

    def _replace(self, row: dict[str, Any]) -> None:
        """Add `row`, in place of an earlier row of the same case, contestant and settings."""
        names = ("case", "contestant", "settings")
        rows = self.results["rows"]
        old = [all(row[name] == other[name] for name in names) for other in rows]
        rows[:] = [other for other, is_old in zip(rows, old, strict=True) if not is_old] + [row]

    def write(self) -> None:
        """Write all results so far, atomically."""
        write_json(self.arguments.out, self.results)

    def _begin(self, case: Case) -> None:
        lengths = typical_step(case, self.arguments.steps, self.arguments.seed)
        facts: dict[str, Any] = {**asdict(case), "tokens_of_a_step": sum(lengths), "floor": None}
        self.results["cases"][case.name] = facts
        if self.results["machine"]["gpu"] and case.shape in SHAPES:
            try:
                facts["floor"] = self._job(
                    "floor", {"shape": case.shape, "lengths": lengths}, self.arguments.timeout
                )
            except JobFailedError as error:
                facts["floor_failed"] = str(error)
                print(f"floor: {error}", flush=True)
        self.write()

    def _contestant(self, entry: Entry) -> dict[str, Any]:
        values = {
            "case": asdict(entry.case),
            "entry": entry.describe(),
            "snapshot": self._snapshot(entry.case.shape),
            **{name: getattr(self.arguments, name) for name in ("steps", "warmup", "seed")},
        }
        return self._job("contestant", values, self.arguments.timeout, entry.contestant)

    def _snapshot(self, shape: str) -> dict[str, Any]:
        """Return the quantised model of `shape`, made on first use."""
        if shape not in self.snapshots:
            values = {"shape": shape, "work": str(self.work), "seed": self.arguments.seed}
            try:
                made = self._job("model", values, PREPARE_SECONDS)
                self.snapshots[shape] = made.pop("snapshot")
                self.results["models"][shape] = made
            except JobFailedError as error:
                self.snapshots[shape] = JobFailedError("failed", f"no model: {error}")
        snapshot = self.snapshots[shape]
        if isinstance(snapshot, JobFailedError):
            raise snapshot
        return snapshot

    def _job(
        self, kind: str, values: dict[str, Any], timeout_seconds: float, name: str = ""
    ) -> dict[str, Any]:
        """Run one job in a process of its own.

        Raises:
            JobFailedError: The job ended without a result, or took too long.
        """
        self._count += 1
        folder = self.work / "jobs" / f"{self._count:02d}-{name or kind}"
        return run_job(CHILD, folder, {**values, "kind": kind}, timeout_seconds)


def _installed(module: str) -> bool:
    return importlib.util.find_spec(module) is not None


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--work", type=Path, required=True, help="models and logs; 4 GB for 4b")
    parser.add_argument("--out", type=Path, required=True, help="JSON with the results")
    parser.add_argument("--suite", action="append", choices=sorted(SUITES), default=[])
    parser.add_argument("--case", action="append", default=[], help="SHAPE:SEQ:CAP[:full][:MxA]")
    parser.add_argument("--contestants", help=f"some of {', '.join(CONTESTANTS)}; default: all")
    parser.add_argument("--steps", type=int, default=8, help="optimizer steps")
    parser.add_argument("--warmup", type=int, default=2, help="steps before the clock starts")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--timeout", type=float, default=240.0, help="seconds a contestant")
    parser.add_argument("--append", action="store_true", help="keep the rows that --out has")
    arguments = parser.parse_args(argv)
    if arguments.contestants:
        arguments.contestants = arguments.contestants.split(",")
        if unknown := set(arguments.contestants) - set(CONTESTANTS):
            parser.error(f"unknown contestant: {', '.join(sorted(unknown))}")
    if not 0 <= arguments.warmup < arguments.steps:
        parser.error("there must be more steps than warm-up steps")
    if not arguments.suite and not arguments.case:
        arguments.suite = ["design", "capped"]
    arguments.out = arguments.out.resolve()
    return arguments


def main() -> int:
    """Run the requested suites and print the table, also after an interruption."""
    arguments = parse()
    try:
        entries = list(select(arguments.suite, arguments.case, arguments.contestants))
        if not entries:
            raise ValueError("No suite or case includes any of these contestants.")
        bench = Bench(arguments)
    except ValueError as error:
        print(error, file=sys.stderr)
        return 2
    # Also SIGINT, which a background job of a shell starts with ignored.
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, signal.default_int_handler)
    interrupted = False
    try:
        bench.run(entries)
    except KeyboardInterrupt:
        interrupted = True
    bench.results["complete"] = not interrupted
    bench.write()
    print(report(bench.results, OURS))
    return 130 if interrupted else 0


if __name__ == "__main__":
    sys.exit(main())
