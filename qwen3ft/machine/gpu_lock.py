"""One run per GPU: file locks named after the GPUs' UUIDs, held by the flow's process.

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
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Literal

from pydantic import ValidationError

from qwen3ft.disk.locks import lock_file, try_lock
from qwen3ft.errors import EnvironmentNotReadyError
from qwen3ft.logs import get_logger
from qwen3ft.records.base import Record
from qwen3ft.text.commands import shell_line

logger = get_logger("lock")

CPU = "cpu"
"""Lock name of runs that train on this machine's CPU."""

FOLDER_VARIABLE = "QWEN3FT_LOCK_DIR"
"""Names another folder: for services with a private /tmp, and containers that share a GPU."""

CHOOSING = f"choosing-{os.getuid()}.lock"
"""Lock file held by the process that chooses GPUs, for a moment; users may share the folder."""

CHOOSE_SECONDS = 5.0
"""Longest wait for those who choose; then the wait for a GPU goes on."""

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
    """Hold the lock of one GPU, or of the `CPU`, while the body runs: see `hold_gpus`."""
    with hold_gpus(
        [gpu],
        run_id,
        count=1,
        when_busy=when_busy,
        wait_seconds=wait_seconds,
        report_seconds=report_seconds,
        folder=folder,
    ):
        yield


@contextmanager
def hold_gpus(
    gpus: Sequence[str],
    run_id: str,
    *,
    count: int | None,
    when_busy: Literal["wait", "refuse"],
    wait_seconds: float,
    report_seconds: float = 30.0,
    folder: Path | None = None,
    meanwhile: Callable[[], None] = lambda: None,
) -> Iterator[tuple[str, ...]]:
    """Hold the locks of some GPUs while the body runs, and yield which.

    Either all that are wanted are held or none: nobody waits with a GPU that another run needs.

    Args:
        gpus: UUIDs of the GPUs to choose from, the best first; or `CPU`.
        run_id: Written into the lock files, for those who wait.
        count: Number to hold; None for all that are free, one at least.
        when_busy: What to do while other runs hold too many.
        wait_seconds: Longest wait.
        report_seconds: Time between two log lines while waiting.
        folder: Folder of the lock files; by default `FOLDER_VARIABLE` or /tmp/qwen3ft-locks-UID.
        meanwhile: Called again and again while waiting; what it raises ends the wait.

    Raises:
        EnvironmentNotReadyError: other runs hold too many and did not end in time, or the folder
            of the lock files cannot be used.
    """
    place = _prepare_folder(folder)
    paths = {gpu: lock_path(place, gpu) for gpu in gpus}
    held = _acquire(place, paths, count, when_busy, wait_seconds, report_seconds, meanwhile)
    try:
        for descriptor in held.values():
            _write_note(descriptor, run_id)
        yield tuple(gpu for gpu in gpus if gpu in held)
    finally:
        for descriptor in held.values():
            # Emptied, not deleted: one process could lock the deleted file and another a new one.
            os.ftruncate(descriptor, 0)
            os.close(descriptor)


def lock_path(folder: Path, gpu: str) -> Path:
    """Return the lock file of a GPU."""
    return folder / f"{re.sub('[^A-Za-z0-9-]', '_', gpu)}.lock"


def holders(gpus: Sequence[str], folder: Path | None = None) -> dict[str, Holder]:
    """Return the runs that hold GPUs now, by UUID; a GPU that is free is missing."""
    place = _prepare_folder(folder)
    found = {}
    for gpu in gpus:
        path = lock_path(place, gpu)
        # A free GPU has no note, and is not locked here: a run that starts now would be refused.
        if read_holder(path) is not None:
            with try_lock(path) as is_free:
                holder = None if is_free else read_holder(path)
            if holder is not None:
                found[gpu] = holder
    return found


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
    folder: Path,
    paths: Mapping[str, Path],
    count: int | None,
    when_busy: Literal["wait", "refuse"],
    wait_seconds: float,
    report_seconds: float,
    meanwhile: Callable[[], None],
) -> dict[str, int]:
    """Return the locked descriptors by GPU, at once or after a wait."""
    started, reports = time.monotonic(), 0
    while not (held := _try_to_hold(folder, paths, count)):
        waited = time.monotonic() - started
        if when_busy == "refuse" or waited >= wait_seconds:
            raise _busy(paths, count, waited, when_busy)
        if waited >= reports * report_seconds:
            reports += 1
            logger.info(
                "%s; waiting for up to %.0f s more",
                _describe_holders(paths),
                wait_seconds - waited,
            )
        meanwhile()
        time.sleep(min(_POLL_SECONDS, wait_seconds - waited))
    if reports:
        free = ", ".join(map(_name, held))
        logger.info("%s free after %.0f s", free, time.monotonic() - started)
    return held


def _try_to_hold(folder: Path, paths: Mapping[str, Path], count: int | None) -> dict[str, int]:
    """Return the locked descriptors by GPU; none if too few are free.

    Only one process chooses at a time. Otherwise two that want two could each take one, give it
    back, and go on so.
    """
    wanted = count or len(paths)
    held: dict[str, int] = {}
    try:
        with try_lock(folder / CHOOSING, CHOOSE_SECONDS) as may_choose:
            for gpu, path in paths.items() if may_choose else ():
                if len(held) < wanted and (descriptor := lock_file(path)) is not None:
                    held[gpu] = descriptor
                    os.ftruncate(descriptor, 0)  # a killed holder left its note
            if len(held) < (count or 1):
                _release(held)
    except OSError as error:
        _release(held)
        raise _no_folder(folder, str(error)) from error
    return held


def _release(held: dict[str, int]) -> None:
    while held:
        os.close(held.popitem()[1])


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


def _describe_holders(paths: Mapping[str, Path]) -> str:
    """Return who holds which GPU, of those that are not free."""
    held = []
    for gpu, path in paths.items():
        with try_lock(path) as is_free:
            if not is_free:
                held.append(f"{_describe_holder(path)} holds {_name(gpu)}")
    return "; ".join(held) or "another run held a GPU until now"


def _name(gpu: str) -> str:
    return "this machine's CPU" if gpu == CPU else f"the GPU {gpu}"


def _busy(
    paths: Mapping[str, Path],
    count: int | None,
    waited: float,
    when_busy: Literal["wait", "refuse"],
) -> EnvironmentNotReadyError:
    description = _describe_holders(paths)
    gpu, path = next(
        ((g, p) for g, p in paths.items() if read_holder(p)), next(iter(paths.items()))
    )
    holder = read_holder(path)
    if when_busy == "refuse":
        why = "A GPU runs one run at a time, and when_gpu_is_busy is 'refuse'."
        command = "qwen3ft run --set when_gpu_is_busy=wait"
    else:
        why = f"It did not end within the {waited:.0f} s that wait_for_gpu_seconds allows."
        command = f"ps -fp {holder.pid}" if holder else f"fuser -v {path}"
    if count is not None and count > 1:
        why += f" This run wants {count} of {len(paths)} GPUs."
    return EnvironmentNotReadyError(
        f"{description[0].upper()}{description[1:]}.",
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
