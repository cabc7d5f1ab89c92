"""One run per card: a file lock named after the card, held by the flow's process.

Guarantees: two runs of one user never hold the same card at one time; the kernel frees the lock
when its holder ends, however it ended; who waits learns who holds it. Worker processes do not carry
the lock (its descriptor is closed on exec), so it is gone with the flow.

The files lie in /tmp/qwen3ft-locks-UID, named by the card's UUID: neither TMPDIR nor
XDG_RUNTIME_DIR is asked, since a login session, a service and a scheduler's job of one user see
different ones. QWEN3FT_LOCK_DIR names another folder, for services with a /tmp of their own and for
containers that share a card.

Not covered: other users, and programs that ask for no lock, such as `qwen3ft chat` and
`qwen3ft plan` (`qwen3ft.recovery.shared_gpu` reads them from NVML); the order among those who wait;
a holder that forks without exec.
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

logger = get_logger("lock")

CPU = "cpu"
"""The name of the lock for runs that train on this machine's CPU."""

FOLDER_VARIABLE = "QWEN3FT_LOCK_DIR"
POLL_SECONDS = 0.2
REPORT_SECONDS = 30.0
NOTE_SECONDS = 1.0
"""How long the note of a holder that has just begun is waited for."""


class Holder(Record):
    """Who holds a card, as it says in the lock file."""

    pid: int
    host: str
    run_id: str
    since: datetime

    def describe(self) -> str:
        """Run, process and since when."""
        return (
            f"run {self.run_id} (pid {self.pid} on {self.host}, "
            f"since {self.since.astimezone():%Y-%m-%d %H:%M:%S})"
        )


@contextmanager
def hold_gpu(
    card: str,
    run_id: str,
    *,
    when_busy: Literal["wait", "refuse"],
    wait_seconds: float,
    folder: Path | None = None,
) -> Iterator[None]:
    """Have the card for this process alone while the body runs.

    Args:
        card: UUID of the GPU, or `CPU`.
        run_id: What others are told.
        when_busy: What to do while another run holds it.
        wait_seconds: Longest wait.
        folder: Where the lock files are; by default see the module's docstring.

    Raises:
        EnvironmentNotReadyError: another run holds the card and did not end in time, or there is no
            folder for lock files.
    """
    path = _prepare_folder(folder) / f"{re.sub('[^A-Za-z0-9-]', '_', card)}.lock"
    descriptor = _acquire(path, card, when_busy, wait_seconds)
    try:
        _write_note(descriptor, run_id)
        yield
    finally:
        # Emptied, not deleted: one who has it open and one who makes it anew would both hold it.
        os.ftruncate(descriptor, 0)
        os.close(descriptor)


def read_holder(path: Path) -> Holder | None:
    """What the note in a lock file says; None while there is none."""
    try:
        return Holder.model_validate_json(path.read_bytes())
    except (OSError, ValidationError):
        return None


def _prepare_folder(folder: Path | None) -> Path:
    """The folder of the lock files; the default one must be this user's own."""
    chosen = os.environ.get(FOLDER_VARIABLE)
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
    path: Path, card: str, when_busy: Literal["wait", "refuse"], wait_seconds: float
) -> int:
    """The locked descriptor, at once or after a wait."""
    started, told = time.monotonic(), 0
    while (descriptor := _try_to_lock(path)) is None:
        waited = time.monotonic() - started
        if when_busy == "refuse" or waited >= wait_seconds:
            raise _busy(path, card, waited, when_busy)
        if waited >= told * REPORT_SECONDS:
            told += 1
            logger.info(
                "%s holds %s; waiting, at most %.0f s more",
                _who(path),
                _name(card),
                wait_seconds - waited,
            )
        time.sleep(min(POLL_SECONDS, wait_seconds - waited))
    if told:
        logger.info("%s is free after %.0f s", _name(card), time.monotonic() - started)
    return descriptor


def _try_to_lock(path: Path) -> int | None:
    """A locked descriptor; None while another process has the lock."""
    try:
        descriptor = lock_file(path)
        if descriptor is not None:
            os.ftruncate(descriptor, 0)  # a killed holder's note
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
        logger.warning("others will not learn who holds the card: %s", error)


def _who(path: Path) -> str:
    deadline = time.monotonic() + NOTE_SECONDS
    while (holder := read_holder(path)) is None and time.monotonic() < deadline:
        time.sleep(0.05)
    return holder.describe() if holder else "a run that left no note"


def _name(card: str) -> str:
    return "this machine's CPU" if card == CPU else f"the card {card}"


def _busy(
    path: Path, card: str, waited: float, when_busy: Literal["wait", "refuse"]
) -> EnvironmentNotReadyError:
    who, holder = _who(path), read_holder(path)
    if when_busy == "refuse":
        why = "One run has a card at a time, and when_gpu_is_busy is 'refuse'."
        command = "qwen3ft run --set when_gpu_is_busy=wait"
    else:
        why = f"It did not end within the {waited:.0f} s that wait_for_gpu_seconds allows."
        command = f"ps -fp {holder.pid}" if holder else f"fuser -v {path}"
    return EnvironmentNotReadyError(
        f"{who} holds {_name(card)}.",
        why=why,
        next_command=command,
        card=card,
        holder=holder.model_dump(mode="json") if holder else None,
        waited_seconds=round(waited, 1),
    )


def _no_folder(path: Path, reason: str) -> EnvironmentNotReadyError:
    return EnvironmentNotReadyError(
        f"The card cannot be locked by {path}: {reason}.",
        why=f"One run has a card at a time, by a file there; {FOLDER_VARIABLE} names another "
        "folder.",
        next_command=f"ls -ld {path.parent}",
        path=str(path),
    )
