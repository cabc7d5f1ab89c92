"""Stage 7: one training attempt in a worker process, with live progress."""

from __future__ import annotations

import contextvars
import threading
import time
from pathlib import Path
from uuid import UUID

import httpx
from prefect import task
from prefect.artifacts import create_progress_artifact, update_progress_artifact
from prefect.cache_policies import NO_CACHE
from prefect.client.schemas.objects import State
from prefect.exceptions import PrefectException
from prefect.states import Failed

from qwen3ft.errors import PreemptedError
from qwen3ft.files import lines_from
from qwen3ft.jobs.folders import JobDir, RunDir, parse_record, read_record
from qwen3ft.jobs.launcher import try_worker
from qwen3ft.logs import get_logger, without_secrets
from qwen3ft.records.plan import TrainPlan
from qwen3ft.records.training import AttemptOutcome, Failure, TrainingMetrics
from qwen3ft.tracking.journal import Journal
from qwen3ft.training import checkpoint
from tasks.names import name_of, train_name

logger = get_logger("train")

PROGRESS_SECONDS = 2.0


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
            result = try_worker("train", job, AttemptOutcome, stall_seconds=plan.stall_seconds)
    except BaseException:
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


class ProgressArtifact:
    """Progress bar on the flow run's page; training never waits for it.

    The API is called from a thread of its own, so that a slow or dead server costs only the bar.
    """

    def __init__(self, plan: TrainPlan, job: JobDir) -> None:
        self.plan = plan
        self.job = job
        self._done = threading.Event()
        self._thread: threading.Thread | None = None

    def __enter__(self) -> ProgressArtifact:
        try:
            artifact = create_progress_artifact(
                progress=0.0,
                key=f"train-{self.plan.attempt}",
                description=f"Attempt {self.plan.attempt}: at most {self.plan.total_steps} steps",
            )
        except (httpx.HTTPError, PrefectException, OSError) as error:
            logger.warning("no progress artifact: %s", error)
            return self
        assert isinstance(artifact, UUID)
        context = contextvars.copy_context()  # with the run's server settings
        self._thread = threading.Thread(
            target=context.run, args=(self._follow, artifact), daemon=True
        )
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._done.set()
        if self._thread is not None:
            self._thread.join(timeout=PROGRESS_SECONDS)

    def _follow(self, artifact: UUID) -> None:
        offset, step, shown = 0, 0, -1
        while True:
            finished = self._done.wait(PROGRESS_SECONDS)
            for line in lines_from(self.job.metrics, offset):
                offset = line.end_offset
                if (metrics := parse_record(line.content, TrainingMetrics)) is not None:
                    step = max(step, metrics.step)
            if finished and self.job.outcome.exists():
                step = self.plan.total_steps
            if step != shown:
                self._show(artifact, 100.0 * step / self.plan.total_steps)
                shown = step
            if finished:
                return

    def _show(self, artifact: UUID, percent: float) -> None:
        try:
            update_progress_artifact(artifact, progress=min(percent, 100.0))
        except (httpx.HTTPError, PrefectException, OSError, RuntimeError) as error:
            logger.debug("progress not shown: %s", error)
