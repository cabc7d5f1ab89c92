"""Work that is killed on the way, in a copy of this process."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable
from typing import Any

from qwen3ft import faults


def killed(work: Callable[[], Any], point: str = "") -> None:
    """Do the work in a forked process, and check that it is killed: at the point, or by itself."""
    child = os.fork()
    if child == 0:
        try:
            os.environ[faults.VARIABLE] = f"kill@point={point}" if point else ""
            work()
        finally:
            os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL, point
