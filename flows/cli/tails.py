"""Readers of what a run in progress appends to the files in its folder."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass

from qwen3ft.disk.files import lines_from
from qwen3ft.jobs.folders import JobDir, RunDir, parse_record
from qwen3ft.records.training import TrainingMetrics

_LOCK_LOGGER = b'"qwen3ft.lock"'


@dataclass(frozen=True)
class Remark:
    """A line about the run: whom it waits for."""

    text: str


@dataclass(frozen=True)
class AttemptProgress:
    """Newest line of a training attempt's metrics, and what is left at most."""

    attempt: int
    total_steps: int | None
    num_epochs: int | None
    seconds_left: float | None
    metrics: TrainingMetrics


@dataclass
class MetricsTail:
    """Reads what was appended to the metrics of a run's newest attempt.

    Attributes:
        run: The run.
        earlier: Number of attempts that were over when the run was resumed, and are not shown.
    """

    run: RunDir
    earlier: int = 0
    attempt: int = 0
    total_steps: int | None = None
    num_epochs: int | None = None
    offset: int = 0
    _first: TrainingMetrics | None = None

    def newest(self) -> AttemptProgress | None:
        """The newest training line since the last call, if there is one."""
        if (job := self._job()) is None:
            return None
        if int(job.path.name) != self.attempt:
            self.attempt, self.offset = int(job.path.name), 0
            self.total_steps = self.num_epochs = self._first = None
        if self.total_steps is None and job.request.exists():
            request = json.loads(job.request.read_text(encoding="utf-8"))
            self.total_steps, self.num_epochs = (
                request.get("total_steps"),
                request.get("num_epochs"),
            )
        newest = None
        for line in lines_from(job.metrics, self.offset):
            self.offset = line.end_offset
            metrics = parse_record(line.content, TrainingMetrics)
            if metrics is not None and metrics.loss is not None:  # None: an evaluation
                newest, self._first = metrics, self._first or metrics
        if newest is None or self._first is None:
            return None
        total = self.total_steps
        left = None if total is None else newest.seconds_left(total, self._first)
        return AttemptProgress(self.attempt, total, self.num_epochs, left, newest)

    def is_over(self) -> bool:
        """Return True if the newest attempt has ended, or there is none."""
        job = self._job()
        return job is None or job.outcome.exists() or job.failure.exists()

    def _job(self) -> JobDir | None:
        jobs = self.run.attempts()[self.earlier :]
        return jobs[-1] if jobs else None


@dataclass
class LockTail:
    """Reads what was appended to a run's log about its wait for the GPU."""

    run: RunDir
    offset: int = 0

    def remarks(self) -> Iterator[Remark]:
        """Yield who holds the GPU, since the last call."""
        for line in lines_from(self.run.log, self.offset):
            self.offset = line.end_offset
            if _LOCK_LOGGER in line.content:
                yield Remark(str(json.loads(line.content)["message"]))


def tails_of(run: RunDir) -> tuple[MetricsTail, LockTail]:
    """Return the readers of a run that is followed: its newest attempt, and the whole log."""
    return MetricsTail(run), LockTail(run)


def tails_from_now(run: RunDir) -> tuple[MetricsTail, LockTail]:
    """Return the readers of what a run that is about to be resumed will append."""
    size_bytes = run.log.stat().st_size if run.log.exists() else 0
    return MetricsTail(run, earlier=len(run.attempts())), LockTail(run, size_bytes)
