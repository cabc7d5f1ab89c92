"""A run outlives whoever reads what it prints.

Prefect's worker reads the output of a run's process through pipes. When the worker is killed, the
next line that Rich prints there ends the process (`rich.console.Console.on_broken_pipe`), although
the run needs the worker for nothing: it tells the server itself how it goes.
"""

from __future__ import annotations

import os
import select
import stat
from contextlib import suppress
from functools import cache
from threading import Thread


@cache
def outlive_reader() -> None:
    """Have output go nowhere from the moment that its pipe has no reader; once per process."""
    pipes = set()
    for descriptor in (1, 2):
        with suppress(OSError):  # closed
            if stat.S_ISFIFO(os.fstat(descriptor).st_mode):
                pipes.add(descriptor)
    if pipes:
        Thread(target=_watch, args=(pipes,), name="output", daemon=True).start()


def _watch(pipes: set[int]) -> None:
    poll = select.poll()
    for descriptor in pipes:
        poll.register(descriptor, 0)  # an error is told unasked, and nothing else is waited for
    while pipes:
        for descriptor, _ in poll.poll():
            nowhere = os.open(os.devnull, os.O_WRONLY)
            os.dup2(nowhere, descriptor)
            os.close(nowhere)
            poll.unregister(descriptor)
            pipes.remove(descriptor)
