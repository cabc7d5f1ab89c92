"""How a worker begins: named, tied to the process that started it, imported, and with a job.

Only `qwen3ft.worker` imports this, and it is a process of its own.
"""

from __future__ import annotations

import ctypes
import gc
import importlib
import json
import os
import select
import signal
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from qwen3ft.jobs.folders import JobDir
from qwen3ft.jobs.processes import PARENT_VARIABLE

PREEMPTED_STATUS = 128 + signal.SIGTERM
_PR_SET_PDEATHSIG = 1
_PR_SET_NAME = 15

LIBRARIES = (
    *("torch", "transformers", "datasets", "qwen3ft.model.lean_bitsandbytes", "peft"),
    *("qwen3ft.data.pipeline", "qwen3ft.evaluation.inference", "qwen3ft.model.adapter"),
    *("qwen3ft.model.manager", "qwen3ft.training.engine"),
)
"""What takes most jobs their first seconds, in an order in which tokenising needs the least."""

NEED_FEWER = ("quantize", "data")
"""Kinds of jobs that import what they need as they come to it, as it is not the half of these."""


def wait_for_job() -> tuple[str, Path] | None:
    """Import what jobs need until one comes on stdin; None if none will.

    From then on this process is as one that was started with the job: its output goes to the job's
    log, and nothing is left to read.
    """
    with _nothing_collected():
        for module in LIBRARIES:
            if select.select([sys.stdin], [], [], 0)[0]:
                break
            with suppress(Exception):  # the job will meet it, and tell
                importlib.import_module(module)
    line = sys.stdin.readline()
    if not line:
        return None
    kind, path = json.loads(line)
    with Path(os.devnull).open("rb") as nothing, JobDir(Path(path)).log.open("ab") as log:
        os.dup2(nothing.fileno(), sys.stdin.fileno())
        for stream in (sys.stdout, sys.stderr):
            stream.flush()
            os.dup2(log.fileno(), stream.fileno())
    return kind, Path(path)


def import_libraries(kind: str) -> None:
    """Import what a job of this kind needs, unless that is little."""
    with _nothing_collected():
        for module in LIBRARIES if kind not in NEED_FEWER else ():
            importlib.import_module(module)


@contextmanager
def _nothing_collected() -> Iterator[None]:
    """Imports make no garbage to speak of, yet looking for it takes a sixth of their time.

    Nor is it looked for later among what they made, which stays.
    """
    gc.disable()
    try:
        yield
    finally:
        gc.freeze()
        gc.enable()


def die_with_parent() -> None:
    """Have this process killed when the one that started it is gone, however it went.

    Linux does it by itself (prctl); elsewhere a thread looks once a second.
    """
    parent = int(os.environ.get(PARENT_VARIABLE, os.getppid()))
    if sys.platform == "linux":
        ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    else:
        threading.Thread(target=_watch_parent, args=(parent,), daemon=True).start()
    if os.getppid() != parent:  # it died before the line above took effect
        os._exit(PREEMPTED_STATUS)


def _watch_parent(parent: int) -> None:
    while os.getppid() == parent:
        time.sleep(1)
    os._exit(PREEMPTED_STATUS)


def set_process_name(kind: str) -> None:
    """Have `top` and `ps -o comm` tell what this process does."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_NAME, f"qwen3ft-{kind}".encode(), 0, 0, 0)
