"""Starts a worker, watches it, relays its log, and says why it ended.

No worker outlives its caller: it is ended with all its children when `try_worker` returns or raises
(an error, a stall, Ctrl-C, a cancelled flow run), and dies by itself when this process is killed
(see `qwen3ft.worker`). Its log records are repeated here, so that they reach the console and the
flow run's log.
"""

from __future__ import annotations

import json
import logging
import shutil
import subprocess
import time
from contextlib import suppress
from pathlib import Path
from typing import TypeVar

from pydantic import BaseModel

from qwen3ft.disk.files import lines_from
from qwen3ft.errors import FinetuneError, StalledError
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
    shutil.rmtree(job.meeting_place.parent, ignore_errors=True)  # of ranks before this worker
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
        error = stall or unrecorded_failure(job, process.returncode, kills_before)
        if not job.request.exists():
            error = folder_gone(job.path)
        failure = Failure.from_error(error)
        with suppress(OSError):  # a full disk must not hide what ended the worker
            write_record(job.failure, failure)
    return failure


def unrecorded_failure(job: JobDir, returncode: int, kills_before: int) -> FinetuneError:
    """Explain the end of a worker that recorded none, by its exit status, its log and the kernel.

    Args:
        job: Its folder.
        returncode: As `subprocess` returns it.
        kills_before: `kernel_oom_kills` before it started.
    """
    oom_kills = kernel_oom_kills() - kills_before
    return translate_exit(
        returncode, _log_tail(job.log), oom_kills=oom_kills, phase=last_sign(job)[0]
    )


def _watch(
    process: subprocess.Popen[bytes], job: JobDir, stall_seconds: float
) -> StalledError | None:
    """Wait for the end of `process`, or until its heartbeat falls silent."""
    records = RecordRelay(job)
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
            return _stalled(job, silence, stall_seconds)
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


def last_sign(job: JobDir) -> tuple[str, int]:
    """Return the phase and the step of the last heartbeat."""
    try:
        found = json.loads(job.heartbeat.read_text())
        return str(found["phase"]), int(found["step"])
    except (OSError, ValueError, KeyError):
        return "start", 0


def _stalled(job: JobDir, silence_seconds: float, limit_seconds: float) -> StalledError:
    """Return the error of a silent worker; of several ranks it names the one that is behind."""
    who, phase = "The worker", last_sign(job)[0]
    if ranks := job.ranks():
        # One that is done is silent; folders of other hosts' ranks may be missing.
        silent = [folder for folder in ranks if not folder.outcome.exists()] or ranks
        job = min(silent, key=lambda folder: (last_sign(folder)[1], beat_time(folder)))
        who, phase = f"Rank {job.path.name}", last_sign(job)[0]
    return StalledError(
        f"{who} gave no sign of life for {silence_seconds:.0f} s "
        f"(limit {limit_seconds:.0f} s); last phase: {phase}.",
        why="It hangs in a kernel, a lock or a file system.",
        next_command=shell_line("tail", "-n", "50", job.log),
        phase=phase,
        **({"rank": int(job.path.name)} if ranks else {}),
    )


def beat_time(job: JobDir) -> int:
    """Return the time of the last heartbeat in ns; 0 before the first."""
    try:
        return job.heartbeat.stat().st_mtime_ns
    except OSError:
        return 0


def kernel_oom_kills() -> int:
    """Count the kernel's OOM kills in this control group (cgroup v2; 0 elsewhere)."""
    try:
        group = Path("/proc/self/cgroup").read_text().strip().rpartition("::")[2]
        events = Path("/sys/fs/cgroup", group.lstrip("/"), "memory.events").read_text()
    except OSError:
        return 0
    counters = dict(line.split() for line in events.splitlines())
    return int(counters.get("oom_kill", 0))


class RecordRelay:
    """Repeats a worker's log records in this process, each once.

    Args:
        job: The worker's folder.
        prefix: Put before each message; with one, only warnings and errors are repeated.
    """

    def __init__(self, job: JobDir, prefix: str = "") -> None:
        self.path = job.path / "log.jsonl"
        self.prefix = prefix
        self.offset = self.path.stat().st_size if self.path.exists() else 0

    def relay(self) -> None:
        """Emit the records that were added since the last call."""
        for line in lines_from(self.path, self.offset):
            self.offset = line.end_offset
            try:
                entry = json.loads(line.content)
            except ValueError:
                continue  # cut off by a kill or a full disk
            level = logging.getLevelNamesMapping().get(entry["level"], logging.INFO)
            if level < logging.WARNING and self.prefix:
                continue
            logger = logging.getLogger(entry.get("logger", ROOT))
            logger.log(level, "%s%s", self.prefix, entry["message"])
