"""Start of a worker: process name, death with the parent, imports, and waiting for a job."""

from __future__ import annotations

import ctypes
import gc
import importlib
import json
import os
import select
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from qwen3ft.jobs.folders import JobDir
from qwen3ft.jobs.processes import (
    HELD_VARIABLE,
    PARENT_VARIABLE,
    PREEMPTED_STATUS,
    end_with_parent,
)
from qwen3ft.machine.gpu_choice import VISIBLE

_PR_SET_NAME = 15

PRELOADED_LIBRARIES = (
    *("torch", "transformers", "datasets", "qwen3ft.model.lean_bitsandbytes", "peft"),
    *("qwen3ft.data.pipeline", "qwen3ft.evaluation.inference", "qwen3ft.model.adapter"),
    *("qwen3ft.model.manager", "qwen3ft.training.engine"),
)
"""Imports that take most jobs their first seconds; those for tokenising come first."""

_AGENTS = frozenset(
    {"RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "GROUP_RANK", "GROUP_WORLD_SIZE"}
    | {"ROLE_RANK", "ROLE_NAME", "ROLE_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"}
)
"""Variables by which torch's agent tells a process its place."""

NEED_FEWER = ("tokenizer", "quantize", "data", "ranks", "join", "answering-ranks")
"""Jobs that need less than half of these and import lazily."""


def wait_for_job() -> tuple[str, Path] | None:
    """Import libraries until a job (kind, folder) arrives on stdin; None if stdin is closed.

    Afterwards the output of this process goes to the job's log, as if it had been started with it.
    """
    with _nothing_collected():
        for module in PRELOADED_LIBRARIES:
            if select.select([sys.stdin], [], [], 0)[0]:
                break
            with suppress(Exception):  # the job meets the same error and reports it
                importlib.import_module(module)
    line = sys.stdin.readline()
    if not line:
        return None
    kind, path = json.loads(line)
    with Path(os.devnull).open("rb") as nothing:
        os.dup2(nothing.fileno(), sys.stdin.fileno())
    _print_to(JobDir(Path(path)).log)
    return kind, Path(path)


def _print_to(path: Path) -> None:
    """Send the output of this process to the end of a file."""
    with path.open("ab") as log:
        for stream in (sys.stdout, sys.stderr):
            stream.flush()
            os.dup2(log.fileno(), stream.fileno())


def enter_rank(attempt: Path) -> Path:
    """Make this process the rank that torch's agent names; return the rank's folder.

    It sees one GPU, its own. What the agent put into the environment is taken out, or transformers
    would distribute the model on its own account.
    """
    rank = int(os.environ["RANK"])
    for name in [name for name in os.environ if name in _AGENTS or name.startswith("TORCHELASTIC")]:
        del os.environ[name]
    folder = JobDir(attempt).rank(rank).path
    _print_to(JobDir(folder).log)
    request = json.loads(JobDir(folder).request.read_text(encoding="utf-8"))
    if request["device"] == "cuda":
        place, held = request["places"][rank], os.environ.get(HELD_VARIABLE, "")
        if per_host := request.get("places_per_host"):
            place %= per_host
        os.environ[VISIBLE] = held.split(",")[place] if held else str(place)
    return folder


def import_libraries(kind: str) -> None:
    """Import the libraries of a job of this kind, unless it imports lazily."""
    with _nothing_collected():
        for module in PRELOADED_LIBRARIES if kind not in NEED_FEWER else ():
            importlib.import_module(module)


@contextmanager
def _nothing_collected() -> Iterator[None]:
    """Switch the garbage collector off for imports, and exempt the imported objects from it."""
    gc.disable()  # imports make hardly any garbage, and looking for it takes a sixth of their time
    try:
        yield
    finally:
        gc.freeze()
        gc.enable()


def die_with_parent() -> None:
    """Have this process killed when its parent ends, however it ends.

    Linux does so itself (prctl); on other systems a thread checks once a second.
    """
    parent = int(os.environ.get(PARENT_VARIABLE, os.getppid()))
    if sys.platform != "linux":
        threading.Thread(target=_watch_parent, args=(parent,), daemon=True).start()
    end_with_parent(parent)


def _watch_parent(parent: int) -> None:
    while os.getppid() == parent:
        time.sleep(1)
    os._exit(PREEMPTED_STATUS)


def set_process_name(kind: str) -> None:
    """Show the kind of job in `top` and `ps -o comm`."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_NAME, f"qwen3ft-{kind}".encode(), 0, 0, 0)
