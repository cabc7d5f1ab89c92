"""Stage 7: one training attempt in a worker process, with live progress."""

from __future__ import annotations

import time
from pathlib import Path

from prefect import task
from prefect.cache_policies import NO_CACHE
from prefect.client.schemas.objects import State
from prefect.states import Failed

from qwen3ft.errors import PreemptedError
from qwen3ft.jobs.folders import RunDir, read_record
from qwen3ft.jobs.launcher import try_worker
from qwen3ft.logs import without_secrets
from qwen3ft.records.plan import TrainPlan
from qwen3ft.records.training import AttemptOutcome, Failure
from qwen3ft.tracking.journal import Journal
from qwen3ft.training import checkpoint
from tasks.names import name_of, train_name
from tasks.progress import ProgressArtifact


@task(name="train", task_run_name=name_of(train_name), cache_policy=NO_CACHE)
@without_secrets()
def train_attempt(plan: TrainPlan) -> AttemptOutcome | State[Failure]:
    """Run the attempt; a `Failure` is the data of the failed state that it returns."""
    run = RunDir(Path(plan.run_dir))
    job = run.attempt(plan.attempt).create(plan)
    journal = Journal(run)
    journal.attempt_started(plan)
    started = time.monotonic()
    try:
        with ProgressArtifact(plan, job):
            result = try_worker(
                plan.worker_kind,
                job,
                AttemptOutcome,
                stall_seconds=plan.stall_seconds,
            )
    except BaseException:  # cancelled, most likely; MLflow must not show it as running
        journal.attempt_ended(plan.attempt, "KILLED", {"failure": PreemptedError.__name__})
        raise
    if isinstance(result, Failure):
        tags, seconds = {"failure": result.kind}, time.monotonic() - started
        journal.attempt_ended(plan.attempt, "FAILED", tags, seconds)
        return Failed(message=f"{result.kind}: {result.to_error()}", data=result)
    journal.attempt_ended(plan.attempt, "FINISHED", seconds=time.monotonic() - started)
    return result


def finished_attempt(run: RunDir, plan: TrainPlan) -> AttemptOutcome | None:
    """Return the outcome of a completed attempt of this run under an equivalent plan, if any.

    A run that failed after training (on a full disk, say) continues from it.
    """
    for job in reversed(run.attempts()):
        if not (job.outcome.exists() and job.request.exists()):
            continue
        if checkpoint.lineage(read_record(job.request, TrainPlan)) == checkpoint.lineage(plan):
            return read_record(job.outcome, AttemptOutcome)
    return None
