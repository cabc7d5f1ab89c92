"""One run per GPU: a file lock named after the GPU's UUID, held by the flow's process.

The kernel frees the lock when its holder ends, however it ends. The lock's descriptor is closed on
exec, so workers do not hold it. Not covered: other users; commands that take no lock, such as
`qwen3ft chat` and `qwen3ft plan` (`qwen3ft.recovery.shared_gpu` reads those from NVML); the order
of those who wait; a holder that forks without exec.
"""

from __future__ import annotations

import os
import re
import socket
import stat
import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Literal

from pydantic import ValidationError

from qwen3ft.errors import EnvironmentNotReadyError
from qwen3ft.locks import lock_file
from qwen3ft.logs import get_logger
from qwen3ft.records.base import Record
from qwen3ft.text.commands import shell_line

logger = get_logger("lock")

CPU = "cpu"
"""Lock name of runs that train on this machine's CPU."""

FOLDER_VARIABLE = "QWEN3FT_LOCK_DIR"
"""Names another folder: for services with a private /tmp, and containers that share a GPU."""

_POLL_SECONDS = 0.2
NOTE_SECONDS = 1.0
"""Longest wait for the note of a holder that has only just locked."""


class Holder(Record):
    """The note in a lock file: the run that holds the GPU."""

    pid: int
    host: str
    run_id: str
    since: datetime

    def describe(self) -> str:
        """Return run, process and start time in words."""
        return (
            f"run {self.run_id} (pid {self.pid} on {self.host}, "
            f"since {self.since.astimezone():%Y-%m-%d %H:%M:%S})"
        )


@contextmanager
def hold_gpu(
    gpu: str,
    run_id: str,
    *,
    when_busy: Literal["wait", "refuse"],
    wait_seconds: float,
    report_seconds: float = 30.0,
    folder: Path | None = None,
) -> Iterator[None]:
    """Hold the lock of a GPU while the body runs.

    Args:
        gpu: UUID of the GPU, or `CPU`.
        run_id: Written into the lock file, for those who wait.
        when_busy: What to do while another run holds it.
        wait_seconds: Longest wait.
        report_seconds: Time between two log lines while waiting.
        folder: Folder of the lock files; by default `FOLDER_VARIABLE` or /tmp/qwen3ft-locks-UID.

    Raises:
        EnvironmentNotReadyError: another run holds the GPU and did not end in time, or the folder
            of the lock files cannot be used.
    """
    path = _prepare_folder(folder) / f"{re.sub('[^A-Za-z0-9-]', '_', gpu)}.lock"
    descriptor = _acquire(path, gpu, when_busy, wait_seconds, report_seconds)
    try:
        _write_note(descriptor, run_id)
        yield
    finally:
        # Emptied, not deleted: one process could lock the deleted file and another a new one.
        os.ftruncate(descriptor, 0)
        os.close(descriptor)


def read_holder(path: Path) -> Holder | None:
    """Read the note in a lock file; None if there is none."""
    try:
        return Holder.model_validate_json(path.read_bytes())
    except (OSError, ValidationError):
        return None


def _prepare_folder(folder: Path | None) -> Path:
    """Make and return the folder of the lock files; the default one must be this user's own."""
    chosen = os.environ.get(FOLDER_VARIABLE)
    # Not TMPDIR or XDG_RUNTIME_DIR: these differ between one user's login session, services and
    # cluster jobs, which must see the same lock. Not the home folder, which may be on NFS, where
    # locks depend on the server, nor /dev/shm, which systemd empties at logout.
    path = folder or Path(chosen or f"/tmp/qwen3ft-locks-{os.getuid()}")  # noqa: S108  checked below
    try:
        path.mkdir(mode=0o700, parents=True, exist_ok=True)
        found = path.lstat()
    except OSError as error:
        raise _no_folder(path, str(error)) from error
    if folder is None and not chosen:
        private = stat.S_ISDIR(found.st_mode) and not found.st_mode & 0o022
        if found.st_uid != os.getuid() or not private:
            raise _no_folder(path, f"it belongs to user {found.st_uid} or others may write to it")
    return path


def _acquire(
    path: Path,
    gpu: str,
    when_busy: Literal["wait", "refuse"],
    wait_seconds: float,
    report_seconds: float,
) -> int:
    """Return the locked descriptor, at once or after a wait."""
    started, reports = time.monotonic(), 0
    while (descriptor := _try_to_lock(path)) is None:
        waited = time.monotonic() - started
        if when_busy == "refuse" or waited >= wait_seconds:
            raise _busy(path, gpu, waited, when_busy)
        if waited >= reports * report_seconds:
            reports += 1
            logger.info(
                "%s holds %s; waiting for up to %.0f s more",
                _describe_holder(path),
                _name(gpu),
                wait_seconds - waited,
            )
        time.sleep(min(_POLL_SECONDS, wait_seconds - waited))
    if reports:
        logger.info("%s is free after %.0f s", _name(gpu), time.monotonic() - started)
    return descriptor


def _try_to_lock(path: Path) -> int | None:
    """Return a locked descriptor; None while another process has the lock."""
    try:
        descriptor = lock_file(path)
        if descriptor is not None:
            os.ftruncate(descriptor, 0)  # a killed holder left its note
    except OSError as error:
        raise _no_folder(path, str(error)) from error
    return descriptor


def _write_note(descriptor: int, run_id: str) -> None:
    holder = Holder(
        pid=os.getpid(), host=socket.gethostname(), run_id=run_id, since=datetime.now(UTC)
    )
    try:
        os.pwrite(descriptor, holder.model_dump_json().encode(), 0)
    except OSError as error:
        logger.warning("cannot write who holds the GPU into its lock file: %s", error)


def _describe_holder(path: Path) -> str:
    deadline = time.monotonic() + NOTE_SECONDS
    while (holder := read_holder(path)) is None and time.monotonic() < deadline:
        time.sleep(0.05)
    return holder.describe() if holder else "a run that left no note"


def _name(gpu: str) -> str:
    return "this machine's CPU" if gpu == CPU else f"the GPU {gpu}"


def _busy(
    path: Path, gpu: str, waited: float, when_busy: Literal["wait", "refuse"]
) -> EnvironmentNotReadyError:
    description, holder = _describe_holder(path), read_holder(path)
    if when_busy == "refuse":
        why = "A GPU runs one run at a time, and when_gpu_is_busy is 'refuse'."
        command = "qwen3ft run --set when_gpu_is_busy=wait"
    else:
        why = f"It did not end within the {waited:.0f} s that wait_for_gpu_seconds allows."
        command = f"ps -fp {holder.pid}" if holder else f"fuser -v {path}"
    return EnvironmentNotReadyError(
        f"{description[0].upper()}{description[1:]} holds {_name(gpu)}.",
        why=why,
        next_command=command,
        gpu=gpu,
        holder=holder.model_dump(mode="json") if holder else None,
        waited_seconds=round(waited, 1),
    )


def _no_folder(path: Path, reason: str) -> EnvironmentNotReadyError:
    return EnvironmentNotReadyError(
        f"The GPU cannot be locked by a file in {path}: {reason}.",
        why=f"A lock file there keeps two runs off one GPU; set {FOLDER_VARIABLE} to use another "
        "folder.",
        next_command=shell_line("ls", "-ld", path.parent),
        path=str(path),
    )
