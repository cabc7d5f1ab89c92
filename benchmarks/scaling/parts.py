"""One part of the scaling benchmark in a process of its own, which prints its result.

It sees the GPUs of the part alone, and starts workers on them as the flow does.
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from benchmarks.gpu_flow import make_rows
from benchmarks.jobs import RESULT
from benchmarks.kills.ranks import processes_of
from benchmarks.kills.trainings import next_attempt
from benchmarks.machine import DeviceMemory
from benchmarks.speed.cases import Case, Entry, Job, Settings
from benchmarks.speed.ours import make_plan
from qwen3ft import logs
from qwen3ft.config import TrainingConfig
from qwen3ft.faults import VARIABLE
from qwen3ft.files import sha256_file
from qwen3ft.jobs.folders import JobDir, RunDir, read_record, read_records, write_record
from qwen3ft.jobs.launcher import try_worker
from qwen3ft.machine.environment import EnvironmentManager
from qwen3ft.machine.gpu_choice import VISIBLE
from qwen3ft.machine.gpus import visible_gpus
from qwen3ft.model.save_adapter import save_adapter
from qwen3ft.planning.gpu_specs import find_gpu_spec
from qwen3ft.planning.speed import estimate_speed
from qwen3ft.planning.workload import workload_of
from qwen3ft.records.evaluation import InferenceReport
from qwen3ft.records.plan import TrainPlan
from qwen3ft.records.requests import InferenceRequest
from qwen3ft.records.training import AttemptOutcome, Failure, TrainingMetrics
from qwen3ft.recovery.adjust import FailedAttempt, Retry, decide_retry
from qwen3ft.training import checkpoint
from qwen3ft.units import GIB, MIB

WARMUP_STEPS = 3
"""Steps that compile kernels and fill caches; no speed is taken from them."""

STALL_SECONDS = 120.0
LEAST_HOST_BYTES = 128 * GIB
"""A virtual machine may show little host memory until it is used; plans must not depend on when
they are made."""

KILLS = "kill@step=4:rank=0,kill@step=6:attempt=2:rank=0"
KILL_STEPS, MOST_ATTEMPTS = 10, 6
EXCHANGES, FIRST_EXCHANGES = 40, 5
TRIAL_SECONDS = 60.0
NCCL_TRIALS: tuple[dict[str, str], ...] = (
    {},
    {"NCCL_MAX_P2P_NCHANNELS": "1"},
    {"NCCL_MAX_P2P_NCHANNELS": "2", "NCCL_BUFFSIZE": "1048576"},
    {"NCCL_MAX_P2P_NCHANNELS": "16"},
    {"NCCL_CUMEM_ENABLE": "0"},
)
"""Settings of NCCL beside the product's own, which are the first; only the exchange alone is tried
under the others."""

TENSORS = 500
"""Tensors of an adapter, about: 7 projections of 36 blocks, two each."""


def main(arguments: Sequence[str]) -> None:
    """Run the part whose file is the first argument, and print its result."""
    path = Path(arguments[0])
    values = json.loads(path.read_text(encoding="utf-8"))
    if len(arguments) > 1:
        exchange_as_rank(path.parent, int(arguments[1]))
        return
    logs.configure(console=True)
    parts: dict[str, Callable[[dict[str, Any]], dict[str, Any]]] = {
        "exchange": exchange,
        "train": train,
        "kill": train_despite_kills,
        "exam": exam,
    }
    print(RESULT + json.dumps(parts[values["kind"]](values)))


def plan_for(values: dict[str, Any]) -> TrainPlan:
    """Return the plan of the part, as the product makes it on this machine."""
    ranks, sequences = values["ranks"], values["sequences"]
    gpus = visible_gpus()
    case = Case(values["model"], values["tokens"], 13.0, sequences_per_step=sequences)
    micro = min(sequences, 4 if sequences <= values["design"] else 16)
    entry = Entry(case, "ours", Settings(micro, sequences // micro))
    folder = Path(values["folder"])
    job = Job(entry, values["rows"], 0, 0, values["snapshot"], folder, values["started"])
    machine = EnvironmentManager().report()
    host_bytes = max(machine.host_total_bytes, LEAST_HOST_BYTES)
    plan = make_plan(
        job,
        machine=machine.model_copy(update={"host_total_bytes": host_bytes}),
        **{"gpus": str(ranks)} if gpus else {"kernels": "fused"},
    )
    plan = plan if gpus else plan.with_settings(places=tuple(range(ranks)))
    return plan.with_settings(
        total_steps=values["steps"],
        evaluate_every_steps=values["steps"],
        early_stopping_patience=1000,
        stall_seconds=STALL_SECONDS,
    )


def attempt(plan: TrainPlan, run: RunDir) -> tuple[JobDir, AttemptOutcome | Failure]:
    """Train as the flow does."""
    job = run.attempt(plan.attempt).create(plan)
    result = try_worker(plan.worker_kind, job, AttemptOutcome, stall_seconds=plan.stall_seconds)
    if left := processes_of(job):
        raise RuntimeError(f"{len(left)} processes of attempt {plan.attempt} are left")
    return job, result


def train(values: dict[str, Any]) -> dict[str, Any]:
    """Train on some ranks."""
    plan, started = plan_for(values), time.monotonic()
    memory = [DeviceMemory(index) for index in range(len(visible_gpus()))]
    job, result = attempt(plan, RunDir(Path(plan.run_dir)))
    if isinstance(result, Failure):
        print_logs(job)
        raise result.to_error()
    lines = losses_of(job)
    # A step's tokens are the same on any number of ranks, so the mean of seconds per token is too.
    rates = [line.tokens_per_second for line in lines if line.step > WARMUP_STEPS]
    seconds_per_token = statistics.fmean(1 / rate for rate in rates if rate)
    tokens = plan.dataset.train.tokens / plan.dataset.train.rows * plan.effective_batch_size
    return {
        "tokens_per_second": 1 / seconds_per_token,
        "step_ms": 1000 * tokens * seconds_per_token,
        "exchange_ms": list(result.rank_exchange_ms),
        "predicted_tokens_per_second": predicted_speed(plan),
        "median_tokens_per_second": statistics.median(filter(None, rates)),
        "rates": rates,
        "losses": [line.loss for line in lines],
        "held_out": [result.first_held_out_loss, result.best_held_out_loss],
        "peak_gb": list(result.rank_peaks_gb or (result.peak_memory_gb,)),
        "nvml_gb": [each.stop() for each in memory],
        "predicted_gb": plan.predicted_peak_bytes / GIB,
        "budget_gb": plan.max_memory_gb,
        "trained_parameters": plan.adapter.trainable_parameters,
        "memory": plan.memory.model_dump(mode="json"),
        "attempt_seconds": time.monotonic() - started,
    }


def losses_of(job: JobDir) -> list[TrainingMetrics]:
    """Return the metrics of the attempt's steps."""
    return [line for line in read_records(job.metrics, TrainingMetrics) if line.loss is not None]


def predicted_speed(plan: TrainPlan) -> float | None:
    """Return the planner's tokens per second; None without a GPU that it knows."""
    gpu = find_gpu_spec(visible_gpus()[0].name) if visible_gpus() else None
    rows = plan.dataset.train
    found = gpu and estimate_speed(
        gpu,
        workload_of(plan),
        sequences_per_step=plan.effective_batch_size,
        typical_tokens=rows.tokens / rows.rows,
    )
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


def exam(values: dict[str, Any]) -> dict[str, Any]:
    """Compare the adapter of an earlier part with its base, as the inference stage does."""
    folder, trained = Path(values["folder"]), RunDir(Path(values["trained"])).attempt(1)
    plan = read_record(trained.request, TrainPlan)
    outcome = read_record(trained.outcome, AttemptOutcome)
    make_rows(folder / "test.jsonl", values["questions"], values["tokens"])
    config = TrainingConfig(
        model_name=plan.model.path,
        cache_dir=str(folder / "cache"),
        output_dir=str(folder / "out"),
        inference_rows=values["questions"],
        max_new_tokens=values["new_tokens"],
        stop_asking_early=False,
        kernels="fused",
        stall_seconds=STALL_SECONDS,
    )
    request = InferenceRequest(
        config=config,
        model=plan.model,
        adapter=save_adapter(outcome, plan, config),
        questions_path=str(folder / "test.jsonl"),
        answers_path=str(folder / "answers.jsonl"),
        device=plan.device,
        batch_size=plan.memory.eval_batch_size,
        budget_gb=plan.max_memory_gb,
        places=tuple(range(values["ranks"])),
    )
    memory = [DeviceMemory(index) for index in range(len(visible_gpus()))]
    job = JobDir(folder / "inference").create(request)
    report = try_worker(request.worker_kind, job, InferenceReport, stall_seconds=STALL_SECONDS)
    if isinstance(report, Failure):
        print_logs(job)
        raise report.to_error()
    return {
        "answer_seconds": report.answer_seconds,
        "predicted_seconds": report.predicted_seconds,
        "stage_seconds": report.seconds,
        "answered_by": report.answered_by,
        "generated": report.generated,
        "peak_gb": (report.peak_bytes or 0) / GIB,
        "nvml_gb": [each.stop() for each in memory],
        "digest": sha256_file(Path(report.answers_path)),
    }


def exchange(values: dict[str, Any]) -> dict[str, Any]:
    """Sum gradients of the adapter's size and nothing else: its time, and NCCL's memory.

    Under the product's settings of NCCL first, then under others.
    """
    folder = Path(values["folder"])
    plan = plan_for(values)
    write_record(folder / "plan.json", plan)
    rows = []
    for settings in NCCL_TRIALS if plan.device == "cuda" else NCCL_TRIALS[:1]:
        row: dict[str, Any] = {"settings": settings}
        try:
            row |= exchange_under(folder, plan.ranks, settings)
        except (RuntimeError, subprocess.TimeoutExpired) as error:
            if not rows:
                raise
            row["failed"] = str(error)[:200]
        rows.append(row)
        print(row, flush=True)
    return {
        **rows[0],
        "gradient_bytes": 4 * plan.adapter.trainable_parameters,
        "trials": rows,
    }


def exchange_under(folder: Path, ranks: int, settings: dict[str, str]) -> dict[str, Any]:
    """Sum gradients in processes of their own, under these settings of NCCL."""
    gpus = [gpu.uuid for gpu in visible_gpus()] or [""] * ranks
    command = [sys.executable, "-m", "benchmarks.scaling.parts", str(folder / "job.json")]
    (folder / "meeting-place").unlink(missing_ok=True)
    log = folder / f"nccl-{'-'.join(settings.values()) or 'ours'}"
    debug = {"NCCL_DEBUG": "INFO", "NCCL_DEBUG_FILE": f"{log}.%p"}
    processes = [
        subprocess.Popen(
            [*command, str(rank)],
            env={**os.environ, **settings, **debug, VISIBLE: gpus[rank]},
            stdout=subprocess.PIPE,
        )
        for rank in range(ranks)
    ]
    found = []
    try:
        for process in processes:
            output = process.communicate(timeout=TRIAL_SECONDS)[0].decode().splitlines()
            if process.returncode or not output:
                raise RuntimeError(f"a rank of the exchange ended with {process.returncode}")
            found.append(json.loads(output[-1]))
    finally:
        for process in processes:
            process.kill()
            process.wait()
    lines = [
        line.rpartition(" : ")[2]
        for path in folder.glob(f"{log.name}.*")
        for line in path.read_text(errors="replace").splitlines()
        if " via " in line
    ]
    return {
        "ms": max(each["ms"] for each in found),
        "first_ms": max(each["first_ms"] for each in found),
        "library_mib": [each["library_mib"] for each in found],
        "via": sorted({line.rpartition(" via ")[2] for line in lines}),
        "connections": len(lines),
    }


def exchange_as_rank(folder: Path, rank: int) -> None:
    """Sum gradients as one of the ranks; print the median time and the memory of the library."""
    import torch

    from qwen3ft.machine.process_memory import nvml_process_bytes
    from qwen3ft.training.ranks import Ranks

    plan = read_record(folder / "plan.json", TrainPlan)
    on_gpu = plan.device == "cuda"
    size = plan.adapter.trainable_parameters // TENSORS
    parameters = [torch.nn.Parameter(torch.zeros(size, device=plan.device)) for _ in range(TENSORS)]

    def outside_bytes() -> int:
        if not on_gpu:
            return 0
        torch.cuda.synchronize()
        free, total = torch.cuda.mem_get_info()
        whole = nvml_process_bytes() or total - free
        return whole - torch.cuda.memory_reserved()

    ranks = Ranks(rank, plan.ranks)
    before, started = outside_bytes(), time.perf_counter()
    ranks.meet(plan, folder / "meeting-place")
    times: list[float] = []
    for _ in range(FIRST_EXCHANGES + EXCHANGES):
        for parameter in parameters:
            parameter.grad = torch.full_like(parameter, rank + 1.0)
        outside_bytes()
        ranks.gather([0.0])
        begun = time.perf_counter()
        loss = ranks.sum_gradients(parameters, torch.tensor(1.0, device=plan.device))
        outside_bytes()
        times.append(time.perf_counter() - begun)
        if not times[1:]:
            first = time.perf_counter() - started
    total = plan.ranks * (plan.ranks + 1) / 2
    assert all(bool((each.grad == total).all()) for each in parameters), "a wrong sum"
    assert float(loss) == plan.ranks, "a wrong loss"
    result = {
        "ms": 1000 * statistics.median(times[FIRST_EXCHANGES:]),
        "first_ms": 1000 * first,
        "library_mib": (outside_bytes() - before) / MIB,
    }
    ranks.leave()
    print(json.dumps(result), flush=True)


if __name__ == "__main__":
    main(sys.argv[1:])
