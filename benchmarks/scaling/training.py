"""Trainings of the scaling benchmark: planned as the product does, and run by its workers."""

from __future__ import annotations

import os
import statistics
import time
from pathlib import Path
from typing import Any

from benchmarks.kills.ranks import processes_of
from benchmarks.kills.trainings import next_attempt
from benchmarks.machine import DeviceMemory
from benchmarks.scaling.prediction import expected
from benchmarks.scaling.process_peaks import ProcessPeaks
from benchmarks.speed.cases import Case, Entry, Job, Settings
from benchmarks.speed.ours import make_plan
from qwen3ft.faults import VARIABLE
from qwen3ft.jobs.folders import JobDir, RunDir, read_records
from qwen3ft.jobs.launcher import try_worker
from qwen3ft.machine.environment import EnvironmentManager
from qwen3ft.machine.gpus import visible_gpus
from qwen3ft.planning import speed
from qwen3ft.planning.gpu_specs import find_gpu_spec
from qwen3ft.planning.speed import estimate_speed
from qwen3ft.planning.workload import workload_of
from qwen3ft.records.plan import TrainPlan
from qwen3ft.records.training import AttemptOutcome, Failure, TrainingMetrics
from qwen3ft.recovery.adjust import FailedAttempt, Retry, decide_retry
from qwen3ft.training import checkpoint
from qwen3ft.units import GIB

LEAST_WARMUP_STEPS, WARMUP_SHARE = 3, 0.2
"""Steps that compile kernels, record graphs and fill caches, and the share of a training for them;
no speed is taken from them."""

STALL_SECONDS = 120.0
LEAST_HOST_BYTES = 128 * GIB
"""A virtual machine may show little host memory until it is used; plans must not depend on when
they are made."""

KILLS = "kill@step=4:rank=0,kill@step=6:attempt=2:rank=0"
KILL_STEPS, MOST_ATTEMPTS = 10, 6


def plan_for(values: dict[str, Any]) -> TrainPlan:
    """Return the plan of the part, as the product makes it on this machine."""
    ranks, sequences = values["ranks"], values["sequences"]
    gpus = visible_gpus()
    speed.OFFLOAD_OVERHEAD = values.get("offload_overhead", speed.OFFLOAD_OVERHEAD)
    case = Case(values["model"], values["tokens"], 13.0, sequences_per_step=sequences)
    micro = min(sequences, 4 if sequences <= values["design"] else 16)
    entry = Entry(case, "ours", Settings(micro, sequences // micro))
    folder = Path(values["folder"])
    job = Job(entry, values["rows"], 0, 0, values["snapshot"], folder, values["started"])
    machine = EnvironmentManager().report()
    host_bytes = max(machine.host_total_bytes, LEAST_HOST_BYTES)
    listed = machine.gpus * ranks if values.get("one_gpu") else machine.gpus
    plan = make_plan(
        job,
        machine=machine.model_copy(update={"host_total_bytes": host_bytes, "gpus": listed}),
        **{"gpus": str(ranks)} if gpus else {"kernels": "fused"},
    )
    places = (0,) * ranks if values.get("one_gpu") else tuple(range(ranks))
    plan = plan.with_settings(places=places)
    return plan.with_settings(
        total_steps=values["steps"],
        evaluate_every_steps=values["steps"],
        early_stopping_patience=1000,
        stall_seconds=STALL_SECONDS,
    )


def attempt(
    plan: TrainPlan, run: RunDir, kind: str | None = None
) -> tuple[JobDir, AttemptOutcome | Failure]:
    """Train as the flow does, or with this kind of worker."""
    job = run.attempt(plan.attempt).create(plan)
    kind = kind or plan.worker_kind
    result = try_worker(kind, job, AttemptOutcome, stall_seconds=plan.stall_seconds)
    if left := processes_of(job):
        raise RuntimeError(f"{len(left)} processes of attempt {plan.attempt} are left")
    return job, result


def train(values: dict[str, Any]) -> dict[str, Any]:
    """Train on some ranks."""
    plan, started = plan_for(values), time.monotonic()
    memory = [DeviceMemory(index) for index in range(len(visible_gpus()))]
    peaks = ProcessPeaks()
    kind = "ranks" if values.get("by_agent") else None
    job, result = attempt(plan, RunDir(Path(plan.run_dir)), kind)
    if isinstance(result, Failure):
        print_logs(job)
        raise result.to_error()
    return speeds_of(job, plan) | {
        "exchange_ms": list(result.rank_exchange_ms),
        "computing_ms": list(result.rank_computing_ms),
        "launch_bound_share": list(result.rank_launch_bound_share),
        "predicted_tokens_per_second": predicted_speed(plan),
        "held_out": [result.first_held_out_loss, result.best_held_out_loss],
        "peak_gb": list(result.rank_peaks_gb or (result.peak_memory_gb,)),
        "nvml_gb": [each.stop() for each in memory],
        "nvml_process_gb": peaks.stop(),
        "predicted_gb": plan.predicted_peak_bytes / GIB,
        "budget_gb": plan.max_memory_gb,
        "trained_parameters": plan.adapter.trainable_parameters,
        "memory": plan.memory.model_dump(mode="json"),
        "attempt_seconds": time.monotonic() - started,
        "expected": expected(workload_of(plan), values.get("alone_step_ms")),
    }


def speeds_of(job: JobDir, plan: TrainPlan) -> dict[str, Any]:
    """Return losses and speeds of an attempt's steps; no speeds if it ended before it was warm."""
    lines = losses_of(job)
    # A step's tokens are the same on any number of ranks, so the mean of seconds per token is too.
    warmup = max(LEAST_WARMUP_STEPS, int(WARMUP_SHARE * plan.total_steps))
    rates = [line.tokens_per_second for line in lines if line.step > warmup]
    found: dict[str, Any] = {"rates": rates, "losses": [line.loss for line in lines]}
    if not rates:
        return found
    seconds_per_token = statistics.fmean(1 / rate for rate in rates if rate)
    tokens = plan.dataset.train.tokens / plan.dataset.train.rows * plan.effective_batch_size
    return found | {
        "tokens_per_second": 1 / seconds_per_token,
        "step_ms": 1000 * tokens * seconds_per_token,
        "median_tokens_per_second": statistics.median(filter(None, rates)),
    }


def losses_of(job: JobDir) -> list[TrainingMetrics]:
    """Return the metrics of the attempt's steps."""
    return [line for line in read_records(job.metrics, TrainingMetrics) if line.loss is not None]


def predicted_speed(plan: TrainPlan) -> float | None:
    """Return the planner's tokens per second; None without a GPU that it knows."""
    gpu = find_gpu_spec(visible_gpus()[0].name) if visible_gpus() else None
    found = gpu and estimate_speed(gpu, workload_of(plan))
    return found.tokens_per_second if found else None


def print_logs(job: JobDir) -> None:
    """Print the ends of all logs of an attempt."""
    for folder in (job, *job.ranks()):
        if folder.log.exists():
            lines = folder.log.read_text(encoding="utf-8", errors="replace").splitlines()
            print(f"--- {folder.log}", *lines[-25:], sep="\n", flush=True)


def train_despite_kills(values: dict[str, Any]) -> dict[str, Any]:
    """Train on some ranks, of which rank 0 is killed twice and then left out, as recovery says."""
    os.environ[VARIABLE] = KILLS
    plan = plan_for(values | {"steps": KILL_STEPS}).with_settings(evaluate_every_steps=2)
    run = RunDir(Path(plan.run_dir))
    failed: list[FailedAttempt] = []
    rows, losses = [], {}
    plan = next_attempt(plan, run)
    while True:
        started = time.monotonic()
        job, result = attempt(plan, run)
        losses |= {line.step: line.loss for line in losses_of(job)}
        row = {"places": list(plan.places), "seconds": time.monotonic() - started}
        rows.append(row)
        if isinstance(result, AttemptOutcome):
            return {"attempts": rows, "losses": [losses[step] for step in sorted(losses)]}
        killed = job.rank(0).heartbeat.stat().st_mtime
        row |= {"failure": result.what, "end_seconds": job.failure.stat().st_mtime - killed}
        failed.append(FailedAttempt(plan, result))
        newest = checkpoint.newest_to_resume([each.checkpoints for each in run.attempts()], plan)
        decision = decide_retry(
            failed,
            max_attempts=MOST_ATTEMPTS,
            allow_degraded=False,
            newest_checkpoint=str(newest.path) if newest else None,
        )
        if not isinstance(decision, Retry):
            print_logs(job)
            raise decision.failure.to_error()
        row["answer"] = decision.reason
        plan = decision.plan
