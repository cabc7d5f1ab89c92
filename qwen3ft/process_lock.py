"""A file that at most one process holds: the kernel frees it when its holder ends, however it ends.

Who holds it, and what for, is kept elsewhere. The files are never deleted while others may come for
them: one who has it open and one who makes it anew would both hold it.
"""

from __future__ import annotations

import fcntl
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def held(path: Path, wait_seconds: float = 0.0) -> Iterator[bool]:
    """Hold the file `path`, made if need be, while the body runs; False if another process does.

    Child processes do not hold it: the descriptor is closed on exec.

    Args:
        path: The lock file.
        wait_seconds: How long one who only looked whether it is held is waited for.

    Raises:
        OSError: the file can be neither opened nor made.
    """
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o600)
    try:
        deadline = time.monotonic() + wait_seconds
        while not (mine := _try_to_lock(descriptor)) and time.monotonic() < deadline:
            time.sleep(0.05)
        yield mine
    finally:
        os.close(descriptor)


def _try_to_lock(descriptor: int) -> bool:
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True
