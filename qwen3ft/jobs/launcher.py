"""Starts a worker, watches it, relays its log, and says why it ended.

No worker outlives its caller: it is ended with all its children when `try_worker` returns or raises
(an error, a stall, Ctrl-C, a cancelled flow run), and dies by itself when this process is killed
(see `qwen3ft.worker`). Its log records are repeated here, so that they reach the console and the
flow run's log.
"""

from __future__ import annotations

import json
import logging
import subprocess
import time
from contextlib import suppress
from pathlib import Path
from typing import TypeVar

from pydantic import BaseModel

from qwen3ft.errors import StalledError
from qwen3ft.files import lines_from
from qwen3ft.jobs.failures import folder_gone, translate_exit
from qwen3ft.jobs.folders import JobDir, read_record, write_record
from qwen3ft.jobs.processes import end_process_tree, start_worker
from qwen3ft.logs import ROOT, mask_secrets
from qwen3ft.records.training import Failure
from qwen3ft.text.commands import shell_line

OutcomeT = TypeVar("OutcomeT", bound=BaseModel)

WATCH_SECONDS = 0.2


def run_worker(
    kind: str,
    job: JobDir,
    outcome_type: type[OutcomeT],
    *,
    stall_seconds: float,
    last: bool = False,
) -> OutcomeT:
    """Have a worker do the job, as `try_worker` does, and return its outcome.

    Raises:
        FinetuneError: the failure, by its class.
    """
    result = try_worker(kind, job, outcome_type, stall_seconds=stall_seconds, last=last)
    if isinstance(result, Failure):
        raise result.to_error()
    return result


def try_worker(
    kind: str,
    job: JobDir,
    outcome_type: type[OutcomeT],
    *,
    stall_seconds: float,
    last: bool = False,
) -> OutcomeT | Failure:
    """Have a worker do the job and wait for it.

    Args:
        kind: One of `qwen3ft.worker.jobs.KINDS`.
        job: Folder with the request; receives log, heartbeat, and outcome or failure.
        outcome_type: Record that a completed worker leaves.
        stall_seconds: Longest silence of the heartbeat before the worker is ended.
        last: True if no other worker follows soon (see `qwen3ft.jobs.processes.workers_ahead`).

    Returns:
        The outcome, or the failure that the folder holds by then: as the worker recorded it, or
        as its silence, exit status and log and the kernel's counters explain it.
    """
    job.outcome.unlink(missing_ok=True)
    job.failure.unlink(missing_ok=True)
    kills_before = kernel_oom_kills()
    process = start_worker(kind, job, last=last)
    try:
        stall = _watch(process, job, stall_seconds)
    finally:
        end_process_tree(process)
    if stall is None and process.returncode == 0 and job.outcome.exists():
        return read_record(job.outcome, outcome_type)
    # A stalled worker that obeyed SIGTERM recorded that it was stopped, which is not the cause.
    failure = None if stall else job.read_failure()
    if failure is None:
        oom_kills = kernel_oom_kills() - kills_before
        error = stall or translate_exit(
            process.returncode, _log_tail(job.log), oom_kills=oom_kills, phase=_last_phase(job)
        )
        if not job.request.exists():
            error = folder_gone(job.path)
        failure = Failure.from_error(error)
        with suppress(OSError):  # a full disk must not hide what ended the worker
            write_record(job.failure, failure)
    return failure


def _watch(
    process: subprocess.Popen[bytes], job: JobDir, stall_seconds: float
) -> StalledError | None:
    """Wait for the end of `process`, or until its heartbeat falls silent."""
    records = _RecordRelay(job.path / "log.jsonl")
    last_beat: int | None = None
    last_change = time.monotonic()
    while process.poll() is None:
        # Silence is timed here, from the last change of the file, so neither a changed clock nor
        # a wrong time in the worker can fake or hide a stall.
        beat = job.heartbeat.stat().st_mtime_ns if job.heartbeat.exists() else None
        if beat != last_beat:
            last_beat, last_change = beat, time.monotonic()
        silence = time.monotonic() - last_change
        if silence > stall_seconds:
            return StalledError(
                f"The worker gave no sign of life for {silence:.0f} s "
                f"(limit {stall_seconds:.0f} s); last phase: {_last_phase(job)}.",
                why="It hangs in a kernel, a lock or a file system.",
                next_command=shell_line("tail", "-n", "50", job.log),
                phase=_last_phase(job),
            )
        records.relay()
        time.sleep(WATCH_SECONDS)
    records.relay()
    return None


def _log_tail(path: Path, lines: int = 30) -> str:
    """Return the last lines of a worker's log, secrets masked."""
    if not path.exists():
        return ""
    with path.open("rb") as stream:
        stream.seek(max(0, path.stat().st_size - 64 * 1024))
        text = stream.read().decode("utf-8", errors="replace")
    return mask_secrets("\n".join(text.splitlines()[-lines:]))


def _last_phase(job: JobDir) -> str:
    """Return the phase in the last heartbeat."""
    try:
        return str(json.loads(job.heartbeat.read_text())["phase"])
    except (OSError, ValueError, KeyError):
        return "start"


def kernel_oom_kills() -> int:
    """Count the kernel's OOM kills in this control group (cgroup v2; 0 elsewhere)."""
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
        for line in lines_from(self.path, self.offset):
            self.offset = line.end_offset
            try:
                entry = json.loads(line.content)
            except ValueError:
                continue  # cut off by a kill or a full disk
            level = logging.getLevelNamesMapping().get(entry["level"], logging.INFO)
            logging.getLogger(entry.get("logger", ROOT)).log(level, "%s", entry["message"])
