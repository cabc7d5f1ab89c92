"""A training attempt's progress on its run's page in Prefect: percent, step, loss, time left."""

from __future__ import annotations

import contextvars
import threading
from uuid import UUID

from prefect.artifacts import create_progress_artifact, update_progress_artifact

from qwen3ft.disk.files import lines_from
from qwen3ft.evaluation.wording import format_seconds
from qwen3ft.jobs.folders import JobDir, parse_record
from qwen3ft.logs import get_logger
from qwen3ft.records.plan import TrainPlan
from qwen3ft.records.training import TrainingMetrics
from tasks.artifacts import NOT_SHOWN

logger = get_logger("train")

PROGRESS_SECONDS = 2.0


class StepProgress:
    """The newest numbers of an attempt, from the lines of its metrics.

    Args:
        total_steps: Step at which the attempt ends, unless it stops early.
    """

    def __init__(self, total_steps: int) -> None:
        self.total_steps = total_steps
        self._first: TrainingMetrics | None = None
        self._newest: TrainingMetrics | None = None
        self._held_out_loss: float | None = None

    @property
    def step(self) -> int:
        """The newest step."""
        return self._newest.step if self._newest else 0

    def add(self, metrics: TrainingMetrics) -> None:
        """Take up a line; an evaluation has no training loss."""
        if metrics.held_out_loss is not None:
            self._held_out_loss = metrics.held_out_loss
        if metrics.loss is not None:
            self._first, self._newest = self._first or metrics, metrics

    def text(self, *, ended: bool = False) -> str:
        """Return `step 120 of 300, loss 0.531, held-out loss 0.770, 2 min 10 s left`."""
        parts = [f"step {self.step:,} of {self.total_steps:,}"]
        if self._newest is not None and self._newest.loss is not None:
            parts.append(f"loss {self._newest.loss:.3f}")
        if self._held_out_loss is not None:
            parts.append(f"held-out loss {self._held_out_loss:.3f}")
        if not ended and self._newest is not None and self._first is not None:
            seconds = self._newest.seconds_left(self.total_steps, self._first)
            parts += [] if seconds is None else [f"{format_seconds(seconds)} left"]
        return ", ".join(parts)


class ProgressArtifact:
    """Progress bar on the flow run's page; training never waits for it.

    The API is called from a thread of its own, so that a slow or dead server costs only the bar.
    """

    def __init__(self, plan: TrainPlan, job: JobDir) -> None:
        self.number = plan.attempt
        self.job = job
        self.progress = StepProgress(plan.total_steps)
        self._done = threading.Event()
        self._thread: threading.Thread | None = None

    def __enter__(self) -> ProgressArtifact:
        try:
            artifact = create_progress_artifact(
                progress=0.0, key=f"train-{self.number}", description=self._description("starting")
            )
        except NOT_SHOWN as error:
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
        offset, shown = 0, ""
        while True:
            finished = self._done.wait(PROGRESS_SECONDS)
            for line in lines_from(self.job.metrics, offset):
                offset = line.end_offset
                if (metrics := parse_record(line.content, TrainingMetrics)) is not None:
                    self.progress.add(metrics)
            completed = finished and self.job.outcome.exists()
            percent = 100.0 if completed else 100.0 * self.progress.step / self.progress.total_steps
            text = self.progress.text(ended=finished)
            if finished:
                text = f"{'completed' if completed else 'ended'} at {text}"
            if text != shown:
                self._show(artifact, percent, text)
                shown = text
            if finished:
                return

    def _show(self, artifact: UUID, percent: float, text: str) -> None:
        try:
            update_progress_artifact(
                artifact, progress=min(percent, 100.0), description=self._description(text)
            )
        except (*NOT_SHOWN, RuntimeError) as error:
            logger.debug("progress not shown: %s", error)

    def _description(self, text: str) -> str:
        return f"Attempt {self.number}: {text}"
