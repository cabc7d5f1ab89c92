"""Compares the fused path with the plain one: losses of a training, and exactness of gradients.

    python -m benchmarks.parity.campaign --work DIR --out results.json [--shape 4b|0.6b|tiny]
        [--steps 100] [--sequences 16] [--rows 1600] [--batch 64] [--layers 8,36]
        [--learning-rate 3e-4] [--cap 13] [--seed 0] [--only training|gradients]

Training: `--steps` optimizer steps of both paths through the product's own worker, each in a fresh
process, with the same model, rows, seed and order. The rows are random tokens of few kinds, so the
loss falls. Loss and gradient norm of every step are compared. On a GPU the plain path runs once
more with products in fp32 instead of bf16; the distance of either path from that is its rounding.

Gradients: both paths' gradients of one batch of `--batch` sequences, compared with those of an fp32
model with the same 4-bit weights (see `gradients.py`). Measured on the embedded model, which is
trained, with real text; and on a GPU on the first `--layers` layers of the random-init shape, with
real text and with random tokens.

The JSON is written after each part. Failed parts are listed at the end, each with its log.
`--shape tiny` needs no GPU.
"""

from __future__ import annotations

import argparse
import sys
import time
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from benchmarks.jobs import JobFailedError, run_job
from benchmarks.machine import machine, write_json
from benchmarks.parity.report import (
    CONTROL,
    PATHS,
    compare_gradients,
    compare_training,
    report,
    verdicts,
)
from benchmarks.speed.cases import SHAPES, TINY, Case, Entry, Settings

CHILD = "benchmarks.parity.training"
PREPARE_SECONDS = 600.0
SEQUENCE_TOKENS = {TINY: 64}
"""Longest sequence of a shape; 256 for all others."""


class ParityBench:
    """One run of the benchmark: its folder, its results, and their file."""

    def __init__(self, arguments: argparse.Namespace) -> None:
        self.arguments = arguments
        self.work: Path = arguments.work.resolve()
        values = {name: value for name, value in vars(arguments).items() if name != "work"}
        self.results: dict[str, Any] = {
            "machine": machine(),
            "arguments": values | {"out": str(arguments.out)},
            "training": {},
            "gradients": {},
            "failed": {},
        }
        self.case = Case(
            arguments.shape,
            SEQUENCE_TOKENS.get(arguments.shape, 256),
            arguments.cap,
            sequences_per_step=arguments.sequences,
        )

    def run(self) -> None:
        """Run all parts; a part that fails does not stop the others."""
        shape = self.arguments.shape
        model = self._part("model", shape, {"shape": shape, "work": str(self.work)})
        if model is not None:
            self.results["model"] = {name: model[name] for name in ("made", "seconds")}
            if self.arguments.only != "gradients":
                self._train(model["snapshot"])
        if self.arguments.only != "training":
            self._measure_all(model["snapshot"]["path"] if model else None)
        self.results["verdicts"] = verdicts(self.results)
        self.results["complete"] = not self.results["failed"]
        self.write()

    def _measure_all(self, model_path: str | None) -> None:
        shape = self.arguments.shape
        batch = replace(self.case, sequences_per_step=self.arguments.batch)
        tiny = replace(batch, shape=TINY)
        self._measure(TINY, {"case": asdict(tiny), "text": True})
        if model_path is not None and shape != TINY:
            values = {"case": asdict(batch), "model": model_path}
            for layers in self.arguments.layers:
                for text in (True, False):
                    name = f"{shape} {layers} layers {'text' if text else 'random tokens'}"
                    self._measure(name, {**values, "layers": layers, "text": text})

    def _train(self, snapshot: dict[str, Any]) -> None:
        arguments = self.arguments
        entry = Entry(self.case, "ours", Settings(arguments.sequences))
        values = {
            "case": asdict(self.case),
            "entry": entry.describe(),
            "snapshot": snapshot,
            "steps": arguments.rows // arguments.sequences,
            "warmup": 0,
            "learning_rate": arguments.learning_rate,
            "total_steps": arguments.steps,
        }
        runs = {}
        for path in (*PATHS, CONTROL) if self.results["machine"]["gpu"] else PATHS:
            kernels, dtype = (PATHS[1], "float32") if path == CONTROL else (path, None)
            run = self._part("training", path, values | {"kernels": kernels, "dtype": dtype})
            if run is None:
                return
            runs[path] = run
        try:
            found = compare_training(runs)
        except ValueError as error:
            self._failed("training", error)
            return
        self.results["training"] = runs
        self.results["training_compared"] = found
        self.write()

    def _measure(self, name: str, values: dict[str, Any]) -> None:
        found = self._part("gradients", name, values)
        if found is None:
            return
        try:
            errors = compare_gradients(found["tensors"])
        except ValueError as error:
            self._failed(f"gradients {name}", error)
            return
        self.results["gradients"][name] = found | {"errors": errors}
        self.write()

    def _failed(self, what: str, error: Exception) -> None:
        self.results["failed"][what] = str(error)
        print(f"{what}: failed: {error}", flush=True)
        self.write()

    def write(self) -> None:
        """Write all results so far, atomically."""
        write_json(self.arguments.out, self.results)

    def _part(self, kind: str, name: str, values: dict[str, Any]) -> dict[str, Any] | None:
        """Return the result of a job; note a failure and return None."""
        started = time.monotonic()
        try:
            result = self._job(kind, name, values)
        except JobFailedError as error:
            self._failed(f"{kind} {name}", error)
            return None
        print(f"{kind} {name}: {time.monotonic() - started:.1f} s", flush=True)
        return result

    def _job(self, kind: str, name: str, values: dict[str, Any]) -> dict[str, Any]:
        """Run one job in a process of its own.

        Raises:
            JobFailedError: The job ended without a result, or took too long.
        """
        folder = self.work / "parity" / f"{kind}-{name.replace(' ', '-')}"
        limit = PREPARE_SECONDS if kind == "model" else self.arguments.timeout
        values = {**values, "kind": kind, "seed": self.arguments.seed}
        try:
            return run_job(CHILD, folder, values, limit)
        except JobFailedError as error:
            raise JobFailedError(error.status, f"{error.detail} ({folder / 'log.txt'})") from None


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--work", type=Path, required=True, help="models and logs; 4 GB for 4b")
    parser.add_argument("--out", type=Path, required=True, help="JSON with the results")
    parser.add_argument("--shape", choices=[*SHAPES, TINY], default="4b")
    parser.add_argument("--steps", type=int, default=100, help="optimizer steps")
    parser.add_argument("--sequences", type=int, default=16, help="per optimizer step")
    parser.add_argument("--rows", type=int, help="rows of an epoch; default: each row once")
    parser.add_argument(
        "--batch", type=int, default=64, help="sequences of the batch for gradients"
    )
    parser.add_argument("--layers", default="8,36", help="numbers of layers for gradients")
    parser.add_argument("--learning-rate", type=float, default=3e-4)
    parser.add_argument("--cap", type=float, default=13.0, help="memory budget of training in GB")
    parser.add_argument("--only", choices=["training", "gradients"], help="run this part alone")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--timeout", type=float, default=300.0, help="seconds per job")
    arguments = parser.parse_args(argv)
    if arguments.rows is None:
        arguments.rows = arguments.steps * arguments.sequences
    arguments.layers = [int(count) for count in arguments.layers.split(",")]
    if min(arguments.steps, arguments.sequences, arguments.batch, *arguments.layers) < 1:
        parser.error("--steps, --sequences, --batch and --layers must be 1 or more")
    if arguments.rows < 1 or arguments.rows % arguments.sequences:
        parser.error("--rows must be a multiple of --sequences")
    arguments.out = arguments.out.resolve()
    return arguments


def main() -> int:
    """Run all parts and print the table; return 1 if a part failed."""
    arguments = parse()
    bench = ParityBench(arguments)
    if arguments.shape != TINY and not bench.results["machine"]["gpu"]:
        print(f"--shape {arguments.shape} needs a GPU; --shape {TINY} does not.", file=sys.stderr)
        return 2
    bench.run()
    print(report(bench.results))
    return 1 if bench.results["failed"] else 0


if __name__ == "__main__":
    sys.exit(main())
