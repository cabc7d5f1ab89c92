"""One job of `memory.py` in a process of its own: `python memory_jobs.py JOB.json`.

As those of `speed.py`, with two more kinds: the matrix of one shape, case after case, and the
settings that need the least memory.
"""

from __future__ import annotations

import gc
import json
import sys
import time
from pathlib import Path
from typing import Any

from benchmarks.machine import DeviceMemory
from benchmarks.memory.cases import MatrixCase
from benchmarks.speed.cases import Case, Entry, Job, Settings
from benchmarks.speed.contestants import KINDS, main
from benchmarks.speed.ours import levers, make_plan, run_ours
from qwen3ft.units import GIB

STEPS = 2
SPARE_GB = 2.0
"""Of the card, left to others."""


def _matrix(values: dict[str, Any], memory: DeviceMemory) -> dict[str, Any]:
    """Rows of the first `count` cases that fit, and of those before them that do not."""
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
        if plan.micro_batch_size != case.micro_batch_size:
            row["status"] = f"split into micro-batches of {plan.micro_batch_size}"
            continue
        started = time.monotonic()
        row |= _measure(plan, memory) | {
            "status": "ok",
            "predicted_gb": plan.predicted_peak_bytes / GIB,
            "parts_gb": {part.name: part.bytes / GIB for part in plan.predicted},
            "levers": levers(plan),
        }
        if values["parts"]:
            row["measured_parts_gb"] = _measure_parts(plan)
        row["seconds"] = time.monotonic() - started
        fitting += 1
        print(json.dumps({name: row[name] for name in ("case", "predicted_gb", "nvml_gb")}))
    return {"rows": rows}


def _job(case: MatrixCase, values: dict[str, Any], folder: Path) -> Job:
    folder.mkdir()
    size = case.micro_batch_size
    workload = Case(case.shape, case.sequence_tokens, values["card_gb"] - SPARE_GB, "full", size)
    entry = Entry(workload, "ours", Settings(size, 1, case.recompute))
    snapshot = values["snapshot"]
    return Job(entry, STEPS, 0, values["seed"], snapshot, folder, values["started"])


def _measure(plan: Any, memory: DeviceMemory) -> dict[str, Any]:
    """Train the plan as its worker does: peaks in GB, of the process as NVML tells it too."""
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


def _measure_parts(plan: Any) -> dict[str, float]:
    """The allocator's peak within each part of the step, in GB."""
    from memory_probe import probed

    _clean()
    with probed() as probe:
        _train(plan)
    return {part: peak / GIB for part, peak in probe.peak_bytes.items()}


def _train(plan: Any) -> Any:
    from qwen3ft.jobs.folders import RunDir
    from qwen3ft.worker import jobs as worker

    run = Path(plan.run_dir)
    place = RunDir(run).attempt(len(RunDir(run).attempts()) + 1).create(plan)
    return worker.train(worker.Job(place.path))


def _clean() -> None:
    import torch

    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()


def _least(values: dict[str, Any], memory: DeviceMemory) -> dict[str, Any]:
    """The speed benchmark's row, under the smallest budget that the planner accepts."""
    from qwen3ft.errors import InsufficientMemoryError

    job = Job.read(values)
    folder = job.folder
    for attempt in range(3):  # what is said to be needed is rounded up, and then it is enough
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
