"""Cases of the memory benchmark: `python -m benchmarks.memory.cases JOB.json` measures some.

A job is one of the speed benchmark's kinds, or one of two more: the matrix of one shape, case after
case, and the settings that need the least memory.
"""

from __future__ import annotations

import gc
import itertools
import json
import random
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.machine import DeviceMemory
from benchmarks.speed.cases import TINY, Case, Entry, Job, Settings
from benchmarks.speed.contestants import KINDS, main
from benchmarks.speed.ours import levers, make_plan, run_ours
from qwen3ft.units import GIB

MICRO_BATCHES = {256: (8, 64), 2048: (2, 16), 8192: (1, 4)}
"""Sequences of a small and a large micro-batch, by the tokens of a sequence."""

TINY_MICRO_BATCHES = {64: (2, 4)}
"""The same for the embedded model, which tries the benchmark without a GPU."""

MATRIX_SHAPES = ("0.6b", "1.7b", "4b", "8b", "14b")
CAPS_GB = {"4b": (4.0, 6.0, 8.0, 12.0, 13.0), "14b": (12.0, 13.0, 16.0)}
CAP_STEPS = 20
LEAST_SEQUENCES = 4
LEAST_PEERS = ("trl", "unsloth")
MATRIX_STEPS = 2
SPARE_GB = 2.0
"""Part of the GPU that the matrix leaves free."""


@dataclass(frozen=True)
class MatrixCase:
    """One micro-batch of full sequences, with all blocks recomputed or none."""

    shape: str
    sequence_tokens: int
    micro_batch_size: int
    recompute: bool

    @property
    def name(self) -> str:
        """Name that no other case has."""
        again = "recompute" if self.recompute else "keep all"
        return f"{self.shape} {self.micro_batch_size} x {self.sequence_tokens}, {again}"


def matrix(shapes: tuple[str, ...], seed: int) -> dict[str, list[MatrixCase]]:
    """Return all cases of each shape, shuffled by `seed`; the first that fit are measured."""
    generator = random.Random(seed)
    cases = {}
    for shape in shapes:
        sizes = TINY_MICRO_BATCHES if shape == TINY else MICRO_BATCHES
        cases[shape] = [
            MatrixCase(shape, tokens, micro, recompute)
            for tokens, recompute in itertools.product(sizes, (True, False))
            for micro in sizes[tokens]
        ]
        generator.shuffle(cases[shape])
    return cases


def _matrix(values: dict[str, Any], memory: DeviceMemory) -> dict[str, Any]:
    """Measure the first `count` cases that fit; also return rows of those that do not."""
    from qwen3ft.errors import InsufficientMemoryError

    rows: list[dict[str, Any]] = []
    fitting = 0
    for number, fields in enumerate(values["cases"]):
        if fitting == values["count"]:
            break
        case = MatrixCase(**fields)
        row: dict[str, Any] = fields | {"case": case.name}
        rows.append(row)
        job = _job(case, values, Path(values["folder"]) / f"{number:02d}")
        try:
            plan = make_plan(job, gradient_checkpointing="on" if case.recompute else "off")
        except InsufficientMemoryError as error:
            row |= {"status": "does not fit", "need_gb": error.facts["need_gb"]}
            continue
        if plan.memory.micro_batch_size != case.micro_batch_size:
            row["status"] = f"split into micro-batches of {plan.memory.micro_batch_size}"
            continue
        started = time.monotonic()
        row |= _measure(plan, memory) | {
            "status": "ok",
            "predicted_gb": plan.predicted_peak_bytes / GIB,
            "parts_gb": {part.name: part.bytes / GIB for part in plan.predicted},
            "levers": levers(plan),
        }
        row["seconds"] = time.monotonic() - started
        fitting += 1
        print(json.dumps({name: row[name] for name in ("case", "predicted_gb", "nvml_gb")}))
    return {"rows": rows}


def _job(case: MatrixCase, values: dict[str, Any], folder: Path) -> Job:
    folder.mkdir()
    size = case.micro_batch_size
    workload = Case(case.shape, case.sequence_tokens, values["gpu_gb"] - SPARE_GB, "full", size)
    entry = Entry(workload, "ours", Settings(size, 1, case.recompute))
    snapshot = values["snapshot"]
    return Job(entry, MATRIX_STEPS, 0, values["seed"], snapshot, folder, values["started"])


def _measure(plan: Any, memory: DeviceMemory) -> dict[str, Any]:
    """Train the plan as its worker does; return peaks in GB, NVML's included."""
    import torch

    _clean()
    memory.peak_bytes = 0
    outcome = _train(plan)
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return {
        "process_gb": outcome.peak_memory_gb,
        "allocated_gb": outcome.peak_allocated_gb,
        "reserved_gb": outcome.peak_reserved_gb,
        "nvml_gb": (memory.peak_bytes or 0) / GIB,
    }


def _train(plan: Any) -> Any:
    from qwen3ft.jobs.folders import RunDir
    from qwen3ft.worker import jobs as worker

    run = Path(plan.run_dir)
    place = RunDir(run).attempt(len(RunDir(run).attempts()) + 1).create(plan)
    return worker.train_job(worker.Job(place.path))


def _clean() -> None:
    import torch

    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()


def _least(values: dict[str, Any], memory: DeviceMemory) -> dict[str, Any]:
    """Return the speed benchmark's row under the smallest budget that the planner accepts."""
    from qwen3ft.errors import InsufficientMemoryError

    job = Job.read(values)
    folder = job.folder
    for attempt in range(3):  # the planner reports a need rounded up, which then is enough
        entry = values["entry"]
        case = values["case"]
        (folder / str(attempt)).mkdir()
        job = Job.read(
            {**values, "entry": entry, "case": case, "folder": str(folder / str(attempt))}
        )
        try:
            result = run_ours(job)
        except InsufficientMemoryError as error:
            values = {**values, "case": case | {"cap_gb": error.facts["need_gb"]}}
            continue
        return result | {"nvml_peak_gb": memory.stop(), "budget_gb": case["cap_gb"]}
    raise RuntimeError(f"no budget is enough, not even {values['case']['cap_gb']} GB")


KINDS |= {"matrix": _matrix, "least": _least}

if __name__ == "__main__":
    main(Path(sys.argv[1]))
