"""Interruptions of a training worker: drawn by a seed, aimed at a moment or a point of the code."""

from __future__ import annotations

import os
import signal
import tempfile
import time
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from random import Random

from benchmarks.kills.power import drop_unsynced
from benchmarks.kills.trainings import Nursery, newest_step, read_failure
from qwen3ft.jobs.folders import RunDir

POINTS = (
    *("file.written", "file.synced", "file.renamed"),
    *("folder.filled", "folder.listed", "folder.renamed"),
    *("step.done", "evaluation.begun", "evaluation.logged", "evaluation.marked"),
    *("checkpoint.committed", "checkpoint.pruned", "training.over"),
)
"""Points of `qwen3ft.faults.POINTS` that a training worker passes."""

SIGNALS = ("kill", "term", "term then kill", "term twice", "stop and go on", "stop for good")
KINDS = (
    *SIGNALS,
    "full disk",
    "power cut",
    "kill at a point",
    "term at a point",
    "hang at a point",
)
MOST_HITS = 6
"""Visits of most points between two checkpoints or so: later ones are often not reached."""

STALL_SECONDS = 2.0
"""Silence after which a worker counts as stalled; a run's default is minutes."""

MOST_SECONDS = 900.0
"""Longest life of an attempt, of some seconds on a quiet machine; past it the worker is stuck."""


@dataclass(frozen=True)
class Strike:
    """One interruption of an attempt."""

    kind: str
    at_seconds: float = 0.0
    """Time after the worker's start, for those that come from outside."""
    again_seconds: float = 0.0
    """Time from the first signal to the second."""
    point: str = ""
    """Name and visit of the point of the code, for those that are aimed; else ''."""

    @property
    def faults(self) -> str:
        """Value of `QWEN3FT_FAULTS` that plants it; '' for one from outside."""
        if not self.point:
            return ""
        action = {"full disk": "full", "power cut": "kill"}.get(self.kind, self.kind.split()[0])
        return f"{action}@point={self.point}"


def draw(random: Random, left_seconds: float) -> Strike:
    """Draw a strike on an attempt that would take about `left_seconds` undisturbed."""
    kind = random.choice(KINDS)
    aimed = kind.endswith("point") or kind == "full disk"
    if aimed or (kind == "power cut" and random.random() < 0.5):
        point = f"{random.choice(POINTS)}:hit={random.randint(1, MOST_HITS)}"
        return Strike(kind, point=point)
    return Strike(kind, random.uniform(0.0, left_seconds), random.uniform(0.0, 0.4))


@dataclass(frozen=True)
class Blow:
    """One attempt under a strike."""

    strike: Strike
    struck: bool
    """False if the attempt ended before the strike came."""
    completed: bool
    ended_as: str
    """Kind of the failure, or 'completed'."""
    phase: str
    """Last phase of the heartbeat."""
    problems: tuple[str, ...] = ()


def suffer(nursery: Nursery, run: RunDir, number: int, strike: Strike) -> Blow:
    """Run an attempt whose folder is prepared under a strike; check what it leaves."""
    job, before = run.attempt(number), newest_step(run)
    with tempfile.TemporaryDirectory(prefix="qwen3ft-power-") as folder:
        power = Path(folder) if strike.kind == "power cut" else None
        worker = nursery.start(job.path, strike.faults, power)
        status, signalled, problems = _strike(nursery, run, number, strike, worker)
        if power is not None and status == -signal.SIGKILL and (power / "before.json").exists():
            drop_unsynced(run.path, power)
    completed = status == 0 and job.outcome.exists()
    failure = None if completed else read_failure(run, number, status)
    if failure is not None and failure.what.startswith("Unexpected"):
        problems.append(f"not classified: {failure.what}")
    if newest_step(run) < before:
        problems.append(f"the checkpoint of step {before} is lost")
    return Blow(
        strike,
        struck=signalled or not completed,
        completed=completed,
        ended_as=failure.kind if failure else "completed",
        phase=_phase(run, number),
        problems=tuple(problems),
    )


def _strike(
    nursery: Nursery, run: RunDir, number: int, strike: Strike, worker: int
) -> tuple[int, bool, list[str]]:
    """Return the worker's exit status, whether it was signalled from outside, and problems."""
    if strike.point:
        if strike.kind.startswith("hang"):
            status = _end_when_silent(nursery, run, number, worker)
        else:
            status = nursery.wait(MOST_SECONDS)
        if status is None:
            return _end(nursery, worker), True, [f"stuck after {strike.faults}"]
        return status, False, []
    if (status := nursery.wait(strike.at_seconds)) is not None:
        return status, False, []
    first = {"kill": signal.SIGKILL, "power cut": signal.SIGKILL}.get(
        strike.kind, signal.SIGTERM if strike.kind.startswith("term") else signal.SIGSTOP
    )
    _send(worker, first)
    if strike.kind == "stop for good":
        status = _end_when_silent(nursery, run, number, worker)
    else:
        second = {
            "term then kill": signal.SIGKILL,
            "term twice": signal.SIGTERM,
            "stop and go on": signal.SIGCONT,
        }.get(strike.kind)
        status = nursery.wait(strike.again_seconds) if second else None
        if status is None and second:
            _send(worker, second)
        status = nursery.wait(MOST_SECONDS) if status is None else status
    if status is None:
        return _end(nursery, worker), True, [f"stuck after {strike.kind}"]
    return status, True, []


def _end_when_silent(nursery: Nursery, run: RunDir, number: int, worker: int) -> int | None:
    """End the worker once its heartbeat is silent, as the flow's process does."""
    beat, silent_since = b"", time.monotonic()
    end = time.monotonic() + MOST_SECONDS
    while time.monotonic() < end:
        if (status := nursery.wait(0.1)) is not None:
            return status
        now = run.attempt(number).heartbeat
        seen = now.read_bytes() + str(now.stat().st_mtime_ns).encode() if now.exists() else b""
        if seen != beat:
            beat, silent_since = seen, time.monotonic()
        if time.monotonic() - silent_since > STALL_SECONDS:
            _send(worker, signal.SIGTERM)
            status = nursery.wait(0.2)
            return _end(nursery, worker) if status is None else status
    return None


def _end(nursery: Nursery, worker: int) -> int:
    """Kill the worker and return its exit status."""
    _send(worker, signal.SIGKILL)
    status = nursery.wait(MOST_SECONDS)
    return -signal.SIGKILL if status is None else status


def _send(worker: int, number: int) -> None:
    with suppress(ProcessLookupError):
        os.kill(worker, number)


def _phase(run: RunDir, number: int) -> str:
    path = run.attempt(number).heartbeat
    text = path.read_text(encoding="utf-8") if path.exists() else ""
    return text.partition('"phase": "')[2].partition('"')[0] or "start"
