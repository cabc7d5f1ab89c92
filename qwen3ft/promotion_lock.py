"""One mover of the registry's aliases at a time on this machine, by a locked file."""

from __future__ import annotations

import fcntl
import hashlib
import os
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from qwen3ft.errors import TrackingUnavailableError
from qwen3ft.tracking_uri import database_path

_POLL_SECONDS = 0.1


@contextmanager
def promotion_lock(tracking_uri: str, wait_seconds: float) -> Iterator[None]:
    """One mover of aliases at a time on this machine.

    Raises:
        TrackingUnavailableError: another one has it for longer than `wait_seconds`.
    """
    database = database_path(tracking_uri)
    if database is not None and database.parent.is_dir():
        path = database.with_name(f"{database.name}.promote.lock")
    else:
        digest = hashlib.sha256(tracking_uri.encode()).hexdigest()[:16]
        path = Path(tempfile.gettempdir()) / f"qwen3ft-{os.getuid()}-{digest}.promote.lock"
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o600)
    try:
        _lock(descriptor, path, wait_seconds)
        yield
    finally:
        os.close(descriptor)


def _lock(descriptor: int, path: Path, wait_seconds: float) -> None:
    deadline = time.monotonic() + wait_seconds
    while True:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            if time.monotonic() >= deadline:
                raise TrackingUnavailableError(
                    f"Another process has been moving aliases for {wait_seconds:.0f} s.",
                    why=f"It holds {path}; MLflow may be slow to answer it.",
                    next_command="qwen3ft history",
                ) from None
            time.sleep(_POLL_SECONDS)
        else:
            return
