"""A file that at most one process holds: the kernel frees it when its holder ends, however it ends.

Who holds it, and what for, is kept elsewhere. Nobody deletes it while holding it: one who has it
open and one who makes it anew would both hold it.
"""

from __future__ import annotations

import fcntl
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def try_lock(path: Path, wait_seconds: float = 0.0) -> Iterator[bool]:
    """Hold the file `path`, made if need be, while the body runs; False if another process does.

    Child processes do not hold it: the descriptor is closed on exec.

    Args:
        path: The lock file.
        wait_seconds: How long one who only looked whether it is held is waited for.

    Raises:
        OSError: the file can be neither opened nor made.
    """
    deadline = time.monotonic() + wait_seconds
    while (descriptor := lock_file(path)) is None and time.monotonic() < deadline:
        time.sleep(0.05)
    try:
        yield descriptor is not None
    finally:
        if descriptor is not None:
            os.close(descriptor)


def lock_file(path: Path) -> int | None:
    """A descriptor of the file `path`, locked and made if need be; None if another process has it.

    No child process inherits it. A file that was deleted after it had been opened (by a cleaner of
    /tmp, or with its folder) is not the one that others come for, so it is opened anew.

    Raises:
        OSError: the file can be neither opened nor made.
    """
    while True:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o600)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if _is_still(descriptor, path):
                return descriptor
        except BlockingIOError:
            os.close(descriptor)
            return None
        except OSError:
            os.close(descriptor)
            raise
        os.close(descriptor)


def _is_still(descriptor: int, path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(descriptor), path.stat())
    except FileNotFoundError:
        return False
