"""Runs a program of others that must not outlive the process that wants it, however that ends.

    python -m qwen3ft.jobs.guard PROGRAM ARGUMENT...

The program is ended, with every process that it has started, when the guard's stdin ends: closed by
whoever started the guard, or by the system when that process is gone. A signal sent at a parent's
death would not do: a program that still loads may ignore it, and its own processes do not get it.
"""

from __future__ import annotations

import ctypes
import os
import subprocess
import sys
import threading
from collections.abc import Sequence
from contextlib import suppress

import psutil

from qwen3ft.jobs.processes import end_process_tree

_PR_SET_CHILD_SUBREAPER = 36
_LOOK_SECONDS = 1.0


def guarded(command: Sequence[str]) -> list[str]:
    """Return the command that runs `command` under guard; start it in a session of its own."""
    return [sys.executable, "-m", __name__, *command]


def run_guarded(command: Sequence[str]) -> int:
    """Run the program until it or stdin ends; return its exit status, as a shell has it."""
    if sys.platform == "linux":  # what its processes leave behind becomes a child of the guard
        ctypes.CDLL(None).prctl(_PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)
    program = subprocess.Popen(command, stdin=subprocess.DEVNULL, start_new_session=True)

    def end_with_stdin() -> None:
        # not by sys.stdin: its lock, held here, would abort the interpreter when the guard ends
        while os.read(0, 2**16):
            pass
        end_process_tree(program)

    threading.Thread(target=end_with_stdin, daemon=True).start()
    status = program.wait()
    while left := psutil.Process().children(recursive=True):
        for process in left:
            with suppress(psutil.NoSuchProcess):
                process.kill()
        psutil.wait_procs(left, timeout=_LOOK_SECONDS)
    return status if status >= 0 else 128 - status


if __name__ == "__main__":
    sys.exit(run_guarded(sys.argv[1:]))
