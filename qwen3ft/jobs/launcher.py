"""Runs one worker process to its end and tells, as a record or as a classified error, how it ended.

Guarantees: the worker is a session of its own, writes to a file, and is gone with all its children
when `run_worker` returns or raises, whatever the reason (an error, a stall, Ctrl-C, a cancelled
flow run); and it dies by itself when this process is killed (see `qwen3ft.worker`). Its log
records are repeated here, so that they reach the console and the flow run's log. This module starts
no CUDA and imports no torch.
"""

from __future__ import annotations

import json
import logging
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

from pydantic import BaseModel

from qwen3ft.errors import FinetuneError, StalledError
from qwen3ft.files import read_json_lines
from qwen3ft.jobs.failures import to_error, translate_exit
from qwen3ft.jobs.folders import JobDir, read_record
from qwen3ft.jobs.processes import end_process_tree, start_worker
from qwen3ft.logs import ROOT, get_logger, mask_secrets

logger = get_logger("launcher")

OutcomeT = TypeVar("OutcomeT", bound=BaseModel)

POLL_SECONDS = 0.2


def run_worker(
    kind: str,
    job: JobDir,
    outcome_type: type[OutcomeT],
    *,
    stall_seconds: float,
    on_poll: Callable[[], None] | None = None,
    last: bool = False,
) -> OutcomeT:
    """Have a worker do the job, wait for it, and return its outcome.

    Args:
        kind: One of `qwen3ft.worker.jobs.KINDS`.
        job: The folder with the request; receives log, heartbeat, failure or outcome.
        outcome_type: The record that a completed worker leaves.
        stall_seconds: Longest silence of the heartbeat before the worker is ended.
        on_poll: Called about five times a second while the worker runs.
        last: Whether no other worker follows soon (see `qwen3ft.jobs.processes.workers_ahead`).

    Raises:
        FinetuneError: the failure the worker recorded, or what its exit status, its log and the
            kernel's counters say.
        StalledError: the heartbeat fell silent.
    """
    job.outcome.unlink(missing_ok=True)
    job.failure.unlink(missing_ok=True)
    kills_before = _kernel_oom_kills()
    process = start_worker(kind, job, last=last)
    try:
        _watch(process, job, stall_seconds, on_poll)
    finally:
        end_process_tree(process)
    if process.returncode == 0 and job.outcome.exists():
        return read_record(job.outcome, outcome_type)
    raise _explain_end(process.returncode, job, _kernel_oom_kills() - kills_before)


def _watch(
    process: subprocess.Popen[bytes],
    job: JobDir,
    stall_seconds: float,
    on_poll: Callable[[], None] | None,
) -> None:
    """Wait for the end of `process`; raise StalledError when its heartbeat falls silent.

    Silence is measured by this process's monotonic clock from the last change of the file, so
    neither a changed clock nor a worker's wrong time can fake or hide a stall.
    """
    records = _RecordRelay(job.path / "log.jsonl")
    last_beat: int | None = None
    last_change = time.monotonic()
    while process.poll() is None:
        beat = job.heartbeat.stat().st_mtime_ns if job.heartbeat.exists() else None
        if beat != last_beat:
            last_beat, last_change = beat, time.monotonic()
        silence = time.monotonic() - last_change
        if silence > stall_seconds:
            raise StalledError(
                f"The worker gave no sign of life for {silence:.0f} s "
                f"(limit {stall_seconds:.0f} s); last: {_last_beat(job)}.",
                why="It hangs in a kernel, a lock or a file system.",
                next_command=f"tail -n 50 {job.log}",
                phase=_last_beat(job),
            )
        records.relay()
        if on_poll is not None:
            on_poll()
        time.sleep(POLL_SECONDS)
    records.relay()
    if on_poll is not None:
        on_poll()


def log_tail(path: Path, lines: int = 30) -> str:
    """The last lines of a worker's log, secrets masked."""
    if not path.exists():
        return ""
    with path.open("rb") as stream:
        stream.seek(max(0, path.stat().st_size - 64 * 1024))
        text = stream.read().decode("utf-8", errors="replace")
    return mask_secrets("\n".join(text.splitlines()[-lines:]))


def _explain_end(returncode: int, job: JobDir, oom_kills: int) -> FinetuneError:
    failure = job.read_failure()
    if failure is not None:
        return to_error(failure)
    tail = log_tail(job.log)
    return translate_exit(returncode, tail, oom_kills=oom_kills, phase=_last_beat(job))


def _last_beat(job: JobDir) -> str:
    """The phase named in the last heartbeat."""
    try:
        return str(json.loads(job.heartbeat.read_text())["phase"])
    except (OSError, ValueError, KeyError):
        return "start"


def _kernel_oom_kills() -> int:
    """How often the kernel's OOM killer struck in this control group (cgroup v2; 0 elsewhere)."""
    try:
        group = Path("/proc/self/cgroup").read_text().strip().rpartition("::")[2]
        events = Path("/sys/fs/cgroup", group.lstrip("/"), "memory.events").read_text()
    except OSError:
        return 0
    counters = dict(line.split() for line in events.splitlines())
    return int(counters.get("oom_kill", 0))


class _RecordRelay:
    """Repeats the worker's log records in this process, each once."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.offset = path.stat().st_size if path.exists() else 0

    def relay(self) -> None:
        """Emit the records that were added since the last call."""
        entries, self.offset = read_json_lines(self.path, self.offset)
        for entry in entries:
            level = logging.getLevelNamesMapping().get(entry["level"], logging.INFO)
            logging.getLogger(entry.get("logger", ROOT)).log(level, "%s", entry["message"])
