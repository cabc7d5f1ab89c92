"""Growth of memory while training: 10,000 tiny steps through the product's own worker.

    python -m benchmarks.leak [--steps 10000] [--out benchmarks/results/leak-cpu.json]

Trains the embedded model on the CPU, one short row per step, with evaluations and checkpoints. The
slope is a Theil-Sen estimate over the lows of 100 blocks of resident memory, after warm-up and
outside evaluations. A second run leaks 256 KiB per step, which would exhaust its budget, and must
end with MemoryLeakError. Exits with 1 if the slope exceeds 1 MiB per 1,000 steps or the planted
leak is not found.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.machine import machine, write_json
from qwen3ft import faults
from qwen3ft.config import TrainingConfig
from qwen3ft.errors import FinetuneError
from qwen3ft.jobs.folders import JobDir, RunDir
from qwen3ft.jobs.launcher import run_worker
from qwen3ft.machine.leaks import theil_sen
from qwen3ft.records.plan import TrainPlan
from qwen3ft.records.training import AttemptOutcome
from qwen3ft.units import GIB, MIB

MOST_MIB_PER_1000_STEPS = 1.0
WARM_UP_SHARE = 0.1
BLOCKS = 100
PLANTED_KIB = 256
PLANTED_FROM_STEP = 100
PLANTED_BUDGET_GB = 1.0
WORDS = ("red", "blue", "green", "gold", "grey", "pink", "teal", "plum")


def write_rows(path: Path, rows: int = 400) -> Path:
    """Write short question-answer rows, all different."""
    lines = (
        {"question": f"{WORDS[i % 8]} {i}?", "answer": f"{WORDS[(i // 8) % 8]} {i * 7 % 1000}"}
        for i in range(rows)
    )
    path.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    return path


def make_plan(work: Path, steps: int) -> TrainPlan:
    """Prepare model and rows, and return the flow's plan with one row per step."""
    from qwen3ft.operations.preview import preview_plan

    config = TrainingConfig(
        model_name="embedded",
        cache_dir=str(work / "cache"),
        data_paths=(str(write_rows(work / "rows.jsonl")),),
        max_memory_gb=4.0,
        batch_size=1,
        gradient_accumulation_steps=1,
        learning_rate=1e-4,
        max_sequence_length=64,
        num_epochs=10_000,
        max_steps=steps,
        evaluate_every_steps=max(10, steps // 20),
        early_stopping_patience=steps,
    )
    return preview_plan(config)


def train(plan: TrainPlan, run: RunDir, fault: str = "") -> tuple[JobDir, FinetuneError | None]:
    """Run one attempt in a worker; return its folder and the error that ended it, if any."""
    plan = plan.for_run(run.path.name, str(run.path), attempt=1, resume_from=None)
    job = run.attempt(1).create(plan)
    os.environ[faults.VARIABLE] = fault
    try:
        run_worker("train", job, AttemptOutcome, stall_seconds=300)
    except FinetuneError as error:
        return job, error
    finally:
        del os.environ[faults.VARIABLE]
    return job, None


def resident(job: JobDir) -> list[tuple[int, float]]:
    """Return (step, resident MiB) of each step after warm-up, without evaluations.

    The worker measures once a second; steps in between repeat the last measurement.
    """
    metrics = [json.loads(line) for line in job.metrics.read_text(encoding="utf-8").splitlines()]
    steps = [line for line in metrics if line["held_out_loss"] is None]
    after = WARM_UP_SHARE * steps[-1]["step"]
    return [
        (line["step"], line["memory_usage"]["allocated_gb"] * GIB / MIB)
        for line in steps
        if line["step"] > after
    ]


def slope_mib_per_1000_steps(points: Sequence[tuple[int, float]]) -> float:
    """Return the Theil-Sen slope over the lows of `BLOCKS` blocks."""
    size = max(1, len(points) // BLOCKS)
    blocks = [points[start : start + size] for start in range(0, len(points), size)]
    lows = [min(block, key=lambda point: point[1]) for block in blocks]
    return 1000 * theil_sen(lows)


def measure(work: Path, steps: int) -> dict[str, Any]:
    """Measure the run without a leak and the one with a planted leak."""
    plan = make_plan(work, steps)
    started = time.monotonic()
    job, error = train(plan, RunDir(work / "clean"))
    if error is not None:
        sys.exit(f"the clean run failed: {error}")
    clean = clean_facts(job, time.monotonic() - started)
    fault = f"leak@step={PLANTED_FROM_STEP}:kib={PLANTED_KIB}"
    leaking = plan.model_copy(update={"max_memory_gb": PLANTED_BUDGET_GB})
    _, error = train(leaking, RunDir(work / "leaking"), fault)
    return {"machine": machine(), "clean": clean, "planted": planted_facts(fault, error)}


def clean_facts(job: JobDir, seconds: float) -> dict[str, Any]:
    """Return the numbers of the run without a leak."""
    points = resident(job)
    readings = re.search(
        r"(\d+) readings for leaks took ([\d.]+) ms", job.log.read_text(encoding="utf-8")
    )
    assert readings is not None
    return {
        "steps": points[-1][0],
        "seconds": round(seconds, 1),
        "first_mib": round(points[0][1], 2),
        "last_mib": round(points[-1][1], 2),
        "lowest_mib": round(min(mib for _, mib in points), 2),
        "highest_mib": round(max(mib for _, mib in points), 2),
        "mib_per_1000_steps": round(slope_mib_per_1000_steps(points), 4),
        "bar_mib_per_1000_steps": MOST_MIB_PER_1000_STEPS,
        "readings_of_the_detector": int(readings[1]),
        "share_of_time": round(float(readings[2]) / 1000 / seconds, 6),
    }


def planted_facts(fault: str, error: FinetuneError | None) -> dict[str, Any]:
    """Return how the run with a leak ended."""
    return {
        "fault": fault,
        "budget_gb": PLANTED_BUDGET_GB,
        "planted_mib_per_1000_steps": PLANTED_KIB * 1000 / 1024,
        "ended_by": type(error).__name__ if error else None,
        "said": error.what if error else None,
        "facts": error.facts if error else {},
    }


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure and print both runs; return 1 if a bar is missed."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=10_000)
    parser.add_argument("--out", type=Path)
    asked = parser.parse_args(arguments)
    os.environ["CUDA_VISIBLE_DEVICES"] = ""
    with tempfile.TemporaryDirectory(prefix="qwen3ft-leak-") as folder:
        results = measure(Path(folder), asked.steps)
    clean, planted = results["clean"], results["planted"]
    print(
        f"{clean['steps']:,} steps in {clean['seconds']:.0f} s: resident memory "
        f"{clean['first_mib']:.1f} -> {clean['last_mib']:.1f} MiB, "
        f"{clean['mib_per_1000_steps']:+.3f} MiB per 1,000 steps "
        f"(bar {MOST_MIB_PER_1000_STEPS:g}); the detector took {clean['share_of_time']:.3%} of the "
        f"time\n"
        f"planted {planted['planted_mib_per_1000_steps']:.0f} MiB per 1,000 steps: "
        f"{planted['ended_by']}: {planted['said']}"
    )
    if asked.out:
        write_json(asked.out, results)
    passed = clean["mib_per_1000_steps"] <= MOST_MIB_PER_1000_STEPS
    return 0 if passed and planted["ended_by"] == "MemoryLeakError" else 1


if __name__ == "__main__":
    sys.exit(main())
