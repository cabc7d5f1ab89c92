"""Limits of time and memory on what somebody else's template or tokenizer does.

Jinja's sandbox keeps a template from files and from Python, but not from looping or building texts
without end. `limited` ends a rendering within this process, wherever it happens. `limit_process`
ends the process itself: for the first try, in a worker of its own, and for native code that returns
to Python too late.
"""

from __future__ import annotations

import os
import resource
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType

from qwen3ft.units import MIB

RENDER_CPU_SECONDS = 3.0
"""CPU time of one rendering; Qwen3's template takes milliseconds for a long conversation."""

RENDER_BYTES = 512 * MIB
"""Memory that one rendering may add to the process."""

_AGAIN_SECONDS = 1.0


class LimitReachedError(BaseException):
    """Raised in the rendering; no `except Exception` of a library stops it on its way."""


@contextmanager
def limited() -> Iterator[None]:
    """Limit CPU time (in the main thread) and added memory (on Linux) of the body.

    Raises:
        LimitReachedError: the time is over.
        MemoryError: the memory is used up.
    """
    with _limited_memory(RENDER_BYTES), _limited_time(RENDER_CPU_SECONDS):
        yield


def limit_process(cpu_seconds: float, added_bytes: int) -> None:
    """Have the kernel end this process after more CPU time; refuse it more memory, for good."""
    used = resource.getrusage(resource.RUSAGE_SELF)
    seconds = int(used.ru_utime + used.ru_stime + cpu_seconds) + 1
    _, hard = resource.getrlimit(resource.RLIMIT_CPU)
    resource.setrlimit(resource.RLIMIT_CPU, (seconds, hard))
    if (held := _held_bytes()) is not None:
        resource.setrlimit(resource.RLIMIT_DATA, (held + added_bytes, held + added_bytes))


@contextmanager
def _limited_time(cpu_seconds: float) -> Iterator[None]:
    if threading.current_thread() is not threading.main_thread():
        yield  # only the main thread receives signals
        return

    def end(_: int, __: FrameType | None) -> None:
        raise LimitReachedError

    before = signal.signal(signal.SIGVTALRM, end)
    signal.setitimer(signal.ITIMER_VIRTUAL, cpu_seconds, _AGAIN_SECONDS)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_VIRTUAL, 0)
        signal.signal(signal.SIGVTALRM, before)


@contextmanager
def _limited_memory(added_bytes: int) -> Iterator[None]:
    held = _held_bytes()
    if held is None:
        yield
        return
    soft, hard = resource.getrlimit(resource.RLIMIT_DATA)
    limits = [limit for limit in (held + added_bytes, soft, hard) if limit != _NO_LIMIT]
    resource.setrlimit(resource.RLIMIT_DATA, (min(limits), hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_DATA, (soft, hard))


_NO_LIMIT = resource.RLIM_INFINITY


def _held_bytes() -> int | None:
    """Return the writable memory that RLIMIT_DATA counts; None where the kernel does not tell."""
    try:
        pages = int(Path("/proc/self/statm").read_text().split()[5])
    except OSError:
        return None
    return pages * os.sysconf("SC_PAGE_SIZE")
