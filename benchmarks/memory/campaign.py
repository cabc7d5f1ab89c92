"""Memory predicted and measured, on one GPU: a matrix of shapes, caps, and the least possible.

    python -m benchmarks.memory.campaign --work DIR --out results.json
        [--suite matrix|caps|least] [--shapes 0.6b,1.7b,4b,8b,14b] [--count 6] [--peers]
        [--seed 0] [--timeout 500] [--baseline benchmarks/results/memory-h100-...json]

- matrix: for each shape the first `--count` cases that fit the GPU, in an order drawn by `--seed`:
  sequences of 256, 2,048 and 8,192 tokens, all recomputed or none, two sizes of micro-batch.
  Compares the plan's prediction with NVML's reading of the process.
- caps: 4B within 4 to 13 GB and 14B within 12 to 16: 20 steps, or a refusal before the first.
- least: 4B, four sequences of up to 256 tokens, under the smallest accepted budget; `--peers` adds
  TRL and Unsloth.

Models are random-init, made once in `--work` by the product. The JSON is written after each part;
`--suite matrix --shapes tiny` tries it without a GPU. With `--baseline`, a case that needs 5 % more
than it did there fails, and the part that grew is named.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

from benchmarks.jobs import JobFailedError, run_job
from benchmarks.machine import machine, write_json
from benchmarks.memory.cases import (
    CAP_STEPS,
    CAPS_GB,
    LEAST_PEERS,
    LEAST_SEQUENCES,
    MATRIX_SHAPES,
    matrix,
)
from benchmarks.memory.report import grown, report, verdicts
from benchmarks.speed.cases import TINY, Case, Entry, Settings

CHILD = "benchmarks.memory.cases"
PREPARE_SECONDS = 600.0
TINY_BUDGET_GB = 6.0
SUITES = ("matrix", "caps", "least")


class MemoryBench:
    """One run of the benchmark: its folder, its results, and their file."""

    def __init__(self, arguments: argparse.Namespace) -> None:
        self.arguments = arguments
        self.work: Path = arguments.work.resolve()
        names = ("suite", "shapes", "count", "seed", "peers")
        self.results: dict[str, Any] = {
            "machine": machine(),
            "arguments": {name: getattr(arguments, name) for name in names},
            "models": {},
            "failed": {},
            **{suite: [] for suite in SUITES},
        }
        self.snapshots: dict[str, Any] = {}
        self._count = 0

    def run(self) -> None:
        """Run every requested suite, shape by shape."""
        runs = {"matrix": self._matrix, "caps": self._caps, "least": self._least}
        for suite in self.arguments.suite:
            for row in runs[suite]():
                self.results[suite].append(row)
                self.write()
        self.results["verdicts"] = verdicts(self.results)
        self.write()

    def write(self) -> None:
        """Write all results so far, atomically."""
        write_json(self.arguments.out, self.results)

    def _matrix(self) -> Iterator[dict[str, Any]]:
        arguments = self.arguments
        for shape, cases in matrix(tuple(arguments.shapes), arguments.seed).items():
            values = {
                "cases": [asdict(case) for case in cases],
                "count": arguments.count,
                "gpu_gb": self.results["machine"]["gpu_total_gb"] or TINY_BUDGET_GB,
            }
            try:
                yield from self._job("matrix", shape, values)["rows"]
            except JobFailedError as error:
                self._failed(f"matrix {shape}", error)

    def _caps(self) -> Iterator[dict[str, Any]]:
        for shape, caps in CAPS_GB.items():
            if shape not in self.arguments.shapes:
                continue
            for cap_gb in caps:
                entry = Entry(Case(shape, 256, cap_gb), "ours", Settings(64))
                yield self._contestant(entry, "contestant", CAP_STEPS)

    def _least(self) -> Iterator[dict[str, Any]]:
        case = Case("4b", 256, 0.5, sequences_per_step=LEAST_SEQUENCES)
        settings = Settings(LEAST_SEQUENCES)
        yield self._contestant(Entry(case, "ours", settings), "least", CAP_STEPS)
        if self.arguments.peers:
            case = Case("4b", 256, 13.0, sequences_per_step=LEAST_SEQUENCES)
            for peer in LEAST_PEERS:
                yield self._contestant(Entry(case, peer, settings), "contestant", CAP_STEPS)

    def _contestant(self, entry: Entry, kind: str, steps: int) -> dict[str, Any]:
        case = entry.case
        row: dict[str, Any] = entry.describe() | {"cap_gb": case.cap_gb, "shape": case.shape}
        values = {"case": asdict(case), "entry": entry.describe(), "steps": steps, "warmup": 1}
        try:
            row |= {"status": "ok", "detail": "", **self._job(kind, case.shape, values)}
        except JobFailedError as error:
            refused = "InsufficientMemoryError" in error.detail
            row |= {"status": "refused" if refused else error.status, "detail": error.detail}
        print(f"{row['case']}: {row['contestant']}: {row['status']} {row['detail']}", flush=True)
        return row

    def _job(self, kind: str, shape: str, values: dict[str, Any]) -> dict[str, Any]:
        """Run one job in a process of its own; make the model of `shape` first if need be.

        Raises:
            JobFailedError: The job ended without a result, or took too long.
        """
        if shape not in self.snapshots:
            prepare = {"kind": "model", "shape": shape, "work": str(self.work)}
            made = self._run(prepare, PREPARE_SECONDS)
            self.snapshots[shape] = made.pop("snapshot")
            self.results["models"][shape] = made
        job = {**values, "kind": kind, "snapshot": self.snapshots[shape]}
        return self._run(job, self.arguments.timeout)

    def _run(self, values: dict[str, Any], timeout_seconds: float) -> dict[str, Any]:
        self._count += 1
        folder = self.work / "memory" / f"{self._count:02d}-{values['kind']}"
        return run_job(CHILD, folder, values | {"seed": self.arguments.seed}, timeout_seconds)

    def _failed(self, what: str, error: JobFailedError) -> None:
        self.results["failed"][what] = str(error)
        print(f"{what}: {error}", flush=True)
        self.write()


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--work", type=Path, required=True, help="models and logs; 20 GB for all")
    parser.add_argument("--out", type=Path, required=True, help="JSON with the results")
    parser.add_argument("--suite", action="append", choices=SUITES, default=[])
    parser.add_argument("--shapes", default=",".join(MATRIX_SHAPES))
    parser.add_argument("--count", type=int, default=6, help="fitting cases per shape")
    parser.add_argument(
        "--peers", action="store_true", help="add TRL and Unsloth to the suite least"
    )
    parser.add_argument("--baseline", type=Path, help="earlier results to compare with")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--timeout", type=float, default=500.0, help="seconds per job")
    arguments = parser.parse_args(argv)
    arguments.shapes = arguments.shapes.split(",")
    if unknown := set(arguments.shapes) - {*MATRIX_SHAPES, TINY}:
        parser.error(f"unknown shape: {', '.join(sorted(unknown))}")
    arguments.suite = arguments.suite or list(SUITES)
    arguments.out = arguments.out.resolve()
    return arguments


def main() -> int:
    """Run the requested suites and print the table; return 1 if a bar is missed or memory grew."""
    arguments = parse()
    bench = MemoryBench(arguments)
    if not bench.results["machine"]["gpu"] and arguments.shapes != [TINY]:
        print(
            "No GPU is visible. Without one, only --suite matrix --shapes tiny can run.",
            file=sys.stderr,
        )
        return 2
    bench.run()
    print(report(bench.results))
    problems = []
    if arguments.baseline:
        problems = grown(bench.results, json.loads(arguments.baseline.read_text(encoding="utf-8")))
        print("\n".join(problems) or f"no case needs 5 % more than in {arguments.baseline.name}")
    return 1 if problems or not all(bench.results["verdicts"].values()) else 0


if __name__ == "__main__":
    sys.exit(main())
