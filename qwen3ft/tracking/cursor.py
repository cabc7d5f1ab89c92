"""The cursor over a run's journal and its attempts' files: how much of them MLflow has.

It is kept in `runs/<run_id>/tracking.state.json`: ids of the MLflow runs, and offsets in bytes of
what was confirmed. Losing it loses nothing, since everything is then sent again.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

from pydantic import BaseModel, Field, ValidationError

from qwen3ft.disk.files import lines_from
from qwen3ft.jobs.folders import RunDir, write_record
from qwen3ft.tracking.checksums import has_checksums
from qwen3ft.tracking.journal import AnyOperation, AttemptStarted, journal_path, parse_operation

_POLL_SECONDS = 0.05


def operations(run_dir: RunDir, offset: int = 0) -> Iterator[AnyOperation]:
    """Yield every undamaged operation from byte `offset` of the journal on."""
    path = journal_path(run_dir)
    sealed = has_checksums(path)
    for line in lines_from(path, offset):
        with suppress(ValueError):  # `find_damaged_lines` names them
            yield parse_operation(line.content, sealed=sealed)


def find_damaged_lines(run_dir: RunDir) -> tuple[int, ...]:
    """Return the numbers, from 1, of the journal's lines that are cut off or were changed."""
    path, found = journal_path(run_dir), []
    sealed = has_checksums(path)
    for number, line in enumerate(lines_from(path), 1):
        try:
            parse_operation(line.content, sealed=sealed)
        except ValueError:
            found.append(number)
    return tuple(found)


class AttemptCursor(BaseModel):
    """A child run, and how far its attempt's files were sent."""

    run_id: str
    metrics_offset: int = 0
    memory_offset: int = 0


class TrackingState(BaseModel):
    """The cursor itself."""

    experiment_id: str | None = None
    parent_run_id: str | None = None
    journal_offset: int = 0
    attempts: dict[int, AttemptCursor] = Field(default_factory=dict)
    tables: list[str] = Field(default_factory=list, description="Artifact paths of the tables.")


def state_path(run_dir: RunDir) -> Path:
    """Return the path of the cursor."""
    return run_dir.path / "tracking.state.json"


def read_state(run_dir: RunDir) -> TrackingState:
    """Read the cursor; an empty one if it is missing or unreadable."""
    try:
        return TrackingState.model_validate_json(state_path(run_dir).read_bytes())
    except (FileNotFoundError, ValidationError):
        return TrackingState()


def write_state(run_dir: RunDir, state: TrackingState) -> None:
    """Replace the cursor, durably."""
    write_record(state_path(run_dir), state)


def parent_run_id(run_dir: RunDir) -> str | None:
    """Return the MLflow id of the run, once MLflow has it."""
    return read_state(run_dir).parent_run_id


def outstanding(run_dir: RunDir) -> int:
    """Count the operations and lines of metrics that MLflow does not have yet."""
    state = read_state(run_dir)
    count = sum(1 for _ in lines_from(journal_path(run_dir), state.journal_offset))
    pending = operations(run_dir, state.journal_offset)
    started = [operation.number for operation in pending if isinstance(operation, AttemptStarted)]
    cursors = {number: AttemptCursor(run_id="") for number in started}
    for number, cursor in (cursors | state.attempts).items():
        job = run_dir.attempt(number)
        count += sum(1 for _ in lines_from(job.metrics, cursor.metrics_offset))
        count += sum(1 for _ in lines_from(job.memory, cursor.memory_offset))
    return count


def wait_until_sent(run_dir: RunDir, timeout_seconds: float) -> bool:
    """Wait until MLflow has what was journaled before this call; False if that took too long.

    Another thread or process must be sending it; a refused operation counts as sent.
    """
    path = journal_path(run_dir)
    target = path.stat().st_size if path.exists() else 0
    deadline = time.monotonic() + timeout_seconds
    while read_state(run_dir).journal_offset < target:
        if time.monotonic() > deadline:
            return False
        time.sleep(_POLL_SECONDS)
    return True
