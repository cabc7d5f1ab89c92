"""Locks on files, held by at most one process; the kernel frees them when the holder ends.

So no lock is ever stale: what a process of a dead machine left is a file without a lock. On NFS the
server frees the locks of a machine that is gone once its lease is over, after about 90 s. A note in
a lock file names its holder for people, and decides nothing.

Nobody deletes a lock file while holding it: a process that has it open and one that creates it anew
would then both hold the lock.
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
    """Lock the file `path` while the body runs; yield False if another process holds it.

    Child processes do not inherit the lock.

    Args:
        path: Lock file, created if missing.
        wait_seconds: Time to wait for a process that only checks whether the lock is held.

    Raises:
        OSError: the file cannot be opened or created.
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
    """Return a descriptor of the locked file `path`; None if another process holds it.

    Child processes do not inherit it. The file is created if missing.

    Raises:
        OSError: the file cannot be opened or created.
    """
    # A file that was deleted after it was opened (by a cleaner of /tmp, or with its folder) is not
    # the one that others lock, so it is opened anew.
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
