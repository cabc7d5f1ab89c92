"""The state of a run, read from its folder alone; no server is asked."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from qwen3ft.disk.locks import try_lock
from qwen3ft.jobs.folders import RunDir
from qwen3ft.operations.night import DEFERRED
from qwen3ft.tracking.cursor import outstanding

State = Literal["running", "completed", "continuable", "unsent", "ended"]

UNFINISHED_OUTCOMES = (DEFERRED, "failed", "cancelled")
"""Outcomes after which a run can be resumed; all others are its end."""

_MARKS = ("config.json", "run.jsonl")


@dataclass(frozen=True)
class RunState:
    """State of one run's folder."""

    run: RunDir
    state: State
    """continuable: not completed, with checkpoints or a trained adapter to resume from; unsent:
    MLflow lacks some of it; ended: nothing to resume from."""
    age_seconds: float
    """Time since its files were last written."""
    uses: frozenset[Path]
    """Folders that its attempts depend on: quantised models, tokenised rows."""


def find_runs(runs_dir: Path) -> list[RunState]:
    """Return the runs below a folder, the newest first; other folders are skipped."""
    now = time.time()
    found = [_describe(RunDir(path), now) for path in _run_folders(runs_dir)]
    return sorted(found, key=lambda state: state.age_seconds)


def is_running(run: RunDir) -> bool:
    """Return True if the run is in progress in some process."""
    if not run.lock.exists():
        return False
    with try_lock(run.lock) as mine:
        return not mine


def ending_of(run: RunDir) -> str | None:
    """Return the sentence on the card of a run that has its verdict; None if it may be resumed."""
    card = _read(run.path / "card.json")
    if card is None:
        return None
    # The cards of older versions have the outcome at the end of their title only.
    outcome = card.get("outcome") or str(card.get("title", "")).rpartition(": ")[2]
    if outcome in UNFINISHED_OUTCOMES:
        return None
    return str(card.get("verdict", ""))


def _run_folders(runs_dir: Path) -> Iterator[Path]:
    if not runs_dir.is_dir():
        return
    for path in sorted(runs_dir.iterdir()):
        named = not path.name.startswith(".") and path.is_dir() and not path.is_symlink()
        if named and any((path / mark).exists() for mark in _MARKS):
            yield path


def _describe(run: RunDir, now: float) -> RunState:
    return RunState(run, _state(run), now - _last_written(run), frozenset(_uses(run)))


def _state(run: RunDir) -> State:
    if is_running(run):
        return "running"
    completed = ending_of(run) is not None
    if not completed and _has_progress(run):
        return "continuable"
    if outstanding(run) > 0:
        return "unsent"
    return "completed" if completed else "ended"


def _has_progress(run: RunDir) -> bool:
    return any(
        job.outcome.exists() or any(job.checkpoints.glob("step-*/manifest.json"))
        for job in run.attempts()
    )


def _last_written(run: RunDir) -> float:
    """Return when files of the run were last written, in seconds since the epoch."""
    # not the lock: looking at it must not make a run younger
    files = [path for path in run.path.iterdir() if path.is_file() and path != run.lock]
    files += [job.metrics for job in run.attempts() if job.metrics.exists()]
    return max((path.stat().st_mtime for path in files), default=run.path.stat().st_mtime)


def _uses(run: RunDir) -> Iterator[Path]:
    for job in run.attempts():
        plan = _read(job.request) or {}
        for part in ("model", "dataset"):
            if path := (plan.get(part) or {}).get("path"):
                yield Path(path).resolve()


def _read(path: Path) -> dict[str, Any] | None:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return content if isinstance(content, dict) else None
