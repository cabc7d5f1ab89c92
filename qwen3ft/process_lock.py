"""A file that at most one process holds: the kernel frees it when its holder ends, however it ends.

Who holds it, and what for, is kept elsewhere. The files are never deleted while others may come for
them: one who has it open and one who makes it anew would both hold it.
"""

from __future__ import annotations

import fcntl
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def held(path: Path) -> Iterator[bool]:
    """Hold the file `path`, made if need be, while the body runs; False if another process does.

    Child processes do not hold it: the descriptor is closed on exec.

    Raises:
        OSError: the file can be neither opened nor made.
    """
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o600)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            mine = True
        except BlockingIOError:
            mine = False
        yield mine
    finally:
        os.close(descriptor)
