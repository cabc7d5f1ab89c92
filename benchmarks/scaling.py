"""Training on 1, 2, 4, 8 ranks of one host beside each other, in the same run.

    python -m benchmarks.scaling [--ranks 1 2 4 8] [--model 4b] [--steps N] [--out FILE]
    python -m benchmarks.scaling --predict

On a machine with GPUs: a random-init model of the exact shape, 13 GB a rank, rows of up to 256
tokens, four times the effective batch of the defaults. Without one: the embedded model in CPU
processes, for correctness; then speeds say only how busy the cores are. Printed are tokens a
second, the efficiency (speed over ranks times that of one), the peak of each rank, and how far the
losses lie from those of one rank. `--predict` prints the planner's expectation for several links
without running anything.

Run on CPUs only so far; what it does on GPUs has never been run.

Exits with 1 if a loss lies more than 0.5 % from that of one rank, if a process is left, or if GPUs
scale less than the bars: 1.9, 3.7 and 7.2 times one.
"""

from __future__ import annotations

import argparse
import os
import shutil
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from benchmarks.gpu_flow import make_rows
from benchmarks.kills.ranks import processes_of
from benchmarks.kills.trainings import make_plan
from benchmarks.machine import report
from benchmarks.speed.cases import SHAPES
from benchmarks.speed.model import make_random_model
from qwen3ft import logs
from qwen3ft.config import TrainingConfig
from qwen3ft.jobs.folders import RunDir, read_records
from qwen3ft.jobs.launcher import try_worker
from qwen3ft.machine.gpus import visible_gpus
from qwen3ft.operations.preview import preview_plan
from qwen3ft.planning.gpu_specs import PCIE_3, PCIE_4, PCIE_5, require_gpu_spec
from qwen3ft.planning.speed import estimate_speed, exchange_seconds
from qwen3ft.planning.what_if import described_machine, shape_request
from qwen3ft.records.plan import TrainPlan
from qwen3ft.records.training import AttemptOutcome, Failure, TrainingMetrics

RANKS = (1, 2, 4, 8)
LEAST_SPEEDUP = {2: 1.9, 4: 3.7, 8: 7.2}
MOST_LOSS_DRIFT = 0.005
CPU_STEPS, GPU_STEPS = 20, 100
SEQUENCES_PER_STEP, ROWS = 256, 8192
LINKS = {"NVLink 4": 0.0, "PCIe 5": PCIE_5, "PCIe 4": PCIE_4, "PCIe 3": PCIE_3}
"""Rate of a link in 1e9 bytes a second; 0 for the GPU's own NVLink."""


def predict(model: str) -> list[dict[str, Any]]:
    """Return the planner's speed-ups on an H200 over several links: computed, not measured."""
    from qwen3ft.planning.fit import choose

    gpu, rows = require_gpu_spec("H200"), []
    config = TrainingConfig(model_name=model, batch_size=16, gradient_accumulation_steps=16)
    request = shape_request(config, described_machine(gpu))
    work = choose(request).work
    for link, rate in LINKS.items():
        linked = replace(gpu, nvlink_gbps=0.0, bus_gbps=rate) if rate else gpu
        for ranks in RANKS[1:]:
            shared = replace(work, ranks=ranks)
            found = estimate_speed(
                linked,
                shared,
                sequences_per_step=config.effective_batch_size,
                typical_tokens=request.typical_tokens,
            )
            assert found is not None
            exchange = exchange_seconds(shared, linked.link_gbps * 1e9)
            rows.append(
                {
                    "link": link,
                    "ranks": ranks,
                    "speedup": round(found.speedup, 2),
                    "efficiency": round(found.speedup / ranks, 3),
                    "exchange_ms": round(1000 * exchange, 2),
                    "exchange_share": round(exchange / found.seconds_per_step, 4),
                }
            )
    return rows


def plan_for(work: Path, model: str, ranks: int, steps: int) -> TrainPlan:
    """Return the plan of the training on this machine."""
    schedule = {
        "total_steps": steps,
        "evaluate_every_steps": steps,
        "places": tuple(range(ranks)),
        "early_stopping_patience": 1000,
    }
    if not visible_gpus():
        return make_plan(work, "fused").with_settings(**schedule)
    config = TrainingConfig(
        model_name=str(random_model(work, model)),
        cache_dir=str(work / "cache"),
        data_paths=(str(write_rows(work)),),
        batch_size=16,
        gradient_accumulation_steps=SEQUENCES_PER_STEP // 16,
        gpus=str(ranks),
    )
    return preview_plan(config).with_settings(**schedule)


def random_model(work: Path, model: str) -> Path:
    """Make a model of the exact shape with random weights, once."""
    folder = work / "models" / model
    if not folder.exists():
        make_random_model(folder, SHAPES[model], seed=0)
    return folder


def write_rows(work: Path) -> Path:
    """Write rows with the lengths of the other benchmarks, once."""
    path = work / "rows.jsonl"
    if not path.exists():
        make_rows(path, ROWS, 256)
    return path


def train(work: Path, plan: TrainPlan, name: str) -> tuple[AttemptOutcome, list[float]]:
    """Train in processes as the flow starts them; return the outcome and the loss of each step."""
    run = RunDir(work / "runs" / name)
    shutil.rmtree(run.path, ignore_errors=True)
    plan = plan.for_run(name, str(run.path), attempt=1, resume_from=None)
    job = run.attempt(1).create(plan)
    kind = "train" if plan.places == (0,) else "ranks"
    result = try_worker(kind, job, AttemptOutcome, stall_seconds=plan.stall_seconds)
    if isinstance(result, Failure):
        raise result.to_error()
    if left := processes_of(job):
        sys.exit(f"{len(left)} processes of {name} are left")
    losses = [line.loss for line in read_records(job.metrics, TrainingMetrics)]
    return result, [loss for loss in losses if loss is not None]


def measure(work: Path, model: str, ranks: Sequence[int], steps: int) -> list[dict[str, Any]]:
    """Train on each number of ranks, the first of which is 1."""
    rows: list[dict[str, Any]] = []
    alone: tuple[AttemptOutcome, list[float]] | None = None
    for size in ranks:
        started = time.monotonic()
        outcome, losses = train(work, plan_for(work, model, size, steps), f"on-{size}")
        alone = alone or (outcome, losses)
        speedup = outcome.tokens_per_second / alone[0].tokens_per_second
        drift = max(abs(a / b - 1) for a, b in zip(losses, alone[1], strict=True))
        rows.append(
            {
                "ranks": size,
                "tokens_per_second": round(outcome.tokens_per_second),
                "speedup": round(speedup, 2),
                "efficiency": round(speedup / size, 3),
                "loss_drift": float(f"{drift:.2e}"),
                "final_loss": round(losses[-1], 6),
                "steps": len(losses),
                "peak_gb": [
                    round(p, 2) for p in outcome.rank_peaks_gb or (outcome.peak_memory_gb,)
                ],
                "seconds": round(time.monotonic() - started, 1),
            }
        )
        print(rows[-1], flush=True)
    return rows


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the benchmark; return 1 if a bar was missed."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--ranks", type=int, nargs="+")
    parser.add_argument("--model", default="4b")
    parser.add_argument("--steps", type=int)
    parser.add_argument("--predict", action="store_true")
    parser.add_argument("--work", type=Path, help="folder to keep")
    parser.add_argument("--out", type=Path)
    asked = parser.parse_args(arguments)
    if asked.predict:
        return report({"predicted": predict(asked.model)}, {}, asked.out)
    logs.configure(console=False)
    gpus = len(visible_gpus())
    if not gpus:
        os.environ["OMP_NUM_THREADS"] = "1"
    ranks = asked.ranks or [size for size in RANKS if size <= (gpus or RANKS[-1])]
    if ranks[0] != 1:
        parser.error("--ranks begins with 1, which the others are compared with")
    work = (asked.work or Path(tempfile.mkdtemp(prefix="qwen3ft-scaling-"))).resolve()
    rows = measure(work, asked.model, ranks, asked.steps or (GPU_STEPS if gpus else CPU_STEPS))
    bars = {
        f"losses on {row['ranks']} ranks within {MOST_LOSS_DRIFT:.1%} of one": row["loss_drift"]
        <= MOST_LOSS_DRIFT
        for row in rows[1:]
    }
    if gpus:
        bars |= {
            f"{row['ranks']} ranks at least {LEAST_SPEEDUP[row['ranks']]} x one": row["speedup"]
            >= LEAST_SPEEDUP[row["ranks"]]
            for row in rows
            if row["ranks"] in LEAST_SPEEDUP
        }
    if asked.work is None:
        shutil.rmtree(work, ignore_errors=True)
    return report({"rows": rows, "predicted": predict(asked.model)}, bars, asked.out)


if __name__ == "__main__":
    sys.exit(main())
