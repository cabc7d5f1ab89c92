"""Starts worker processes, one of them ahead of need, and ends them.

A worker needs 10 to 20 s to import torch, transformers, bitsandbytes and peft, and a run needs one
worker for each of its stages and attempts. Within `workers_ahead` the next one therefore starts
while its predecessor works: it imports, and waits for its job on stdin. It has no CUDA context and
takes 4 MiB of GPU memory.
"""

from __future__ import annotations

import ctypes
import json
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import psutil

from qwen3ft.jobs.folders import JobDir
from qwen3ft.units import GIB

GRACE_SECONDS = 7.0
"""Time from SIGTERM to SIGKILL; a cancelled run has to be gone within 10 s in all."""

PARENT_VARIABLE = "QWEN3FT_PARENT_PID"
HELD_VARIABLE = "QWEN3FT_HELD_GPUS"
"""GPUs of the run for its ranks, as `CUDA_VISIBLE_DEVICES` names them; empty for all there are."""

WORKER_MODULE = "qwen3ft.worker"
"""Module that a worker runs, ranks apart; a benchmark puts its own around it."""

WAIT = "wait"
"""Argument in place of a kind: the job comes later, as a line of JSON on stdin."""

PREEMPTED_STATUS = 128 + signal.SIGTERM
_PR_SET_PDEATHSIG = 1

LEAST_FREE_BYTES = 4 * GIB
"""Free host memory needed for an idle worker, which takes up to a GiB once it has imported."""

_Process = subprocess.Popen[bytes]


@dataclass(frozen=True)
class _Environment:
    """Environment variables and working directory that a worker inherits."""

    variables: dict[str, str]
    folder: str

    @classmethod
    def now(cls) -> _Environment:
        # OpenMP threads wait for each other by spinning: with one core taken by another process, a
        # team of all cores was fifty times slower, one of a core less hardly at all (DECISIONS.md).
        # Cores that a container or taskset withholds are not there.
        threads = {"OMP_NUM_THREADS": str(max(1, _usable_cores() - 1))}
        # NVML's order, by which the GPU was chosen and locked; CUDA's own puts the fastest first.
        order = {"CUDA_DEVICE_ORDER": "PCI_BUS_ID"}
        marks = {PARENT_VARIABLE: str(os.getpid()), "PYTHONUNBUFFERED": "1"}
        return cls({**threads, **order, **os.environ, **marks, **_one_gpu()}, str(Path.cwd()))


def _usable_cores() -> int:
    """Return the number of cores that this process may run on."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 2  # macOS binds no process to cores


def _one_gpu() -> dict[str, str]:
    """Let a worker see the first GPU of the run alone, and tell it of the others for its ranks.

    Of several that it sees, transformers would use all: it multiplies its batch sizes by their
    number, and copies an unquantised model to each.
    """
    held = os.environ.get("CUDA_VISIBLE_DEVICES")
    first = "0" if held is None else held.split(",")[0]
    return {"CUDA_VISIBLE_DEVICES": first, HELD_VARIABLE: held or ""}


class _Spare:
    """The idle worker that waits for a job, if there is one."""

    def __init__(self) -> None:
        self.wanted = False
        self._lock = threading.Lock()
        self._process: _Process | None = None
        self._environment: _Environment | None = None

    def start(self) -> None:
        """Start an idle worker, unless there is one or memory is short."""
        with self._lock:
            short = psutil.virtual_memory().available < LEAST_FREE_BYTES
            if short or (self._process is not None and self._process.poll() is None):
                return
            self._environment = _Environment.now()
            self._process = _start([WAIT], self._environment, subprocess.PIPE, subprocess.DEVNULL)

    def take(self, kind: str, job: JobDir, environment: _Environment) -> _Process | None:
        """Hand the job to the idle worker; None if there is none or its environment differs."""
        with self._lock:
            process, self._process = self._process, None
        if process is None:
            return None
        if environment == self._environment and process.poll() is None:
            assert process.stdin is not None
            with suppress(BrokenPipeError):
                with process.stdin as stream:
                    stream.write(json.dumps([kind, str(job.path)]).encode() + b"\n")
                return process
        end_process_tree(process)
        return None

    def end(self) -> None:
        """End the idle worker."""
        with self._lock:
            process, self._process = self._process, None
        if process is not None:
            process.kill()  # it has no work to lose
            end_process_tree(process)


_spare = _Spare()

STARTER_NAME = "worker-starter"

_starter = ThreadPoolExecutor(max_workers=1, thread_name_prefix=STARTER_NAME)
"""Thread that starts every worker. Linux ends a worker when the thread that started it ends (see
`worker.bootstrap.die_with_parent`), and an idle worker outlives the task that it was started in."""


@contextmanager
def workers_ahead() -> Iterator[None]:
    """Keep an idle worker ready for the next job while the body runs.

    It is gone when the body ends, or when this process does. One that died while it waited is
    replaced without notice: if its cause persists, the next job meets and reports it.
    """
    _spare.wanted = True
    _spare.start()
    try:
        yield
    finally:
        _spare.wanted = False
        _spare.end()


def start_worker(kind: str, job: JobDir, *, last: bool = False) -> _Process:
    """Start the job in the idle worker, or in a new one.

    Args:
        kind: One of `qwen3ft.worker.jobs.KINDS`.
        job: Folder with the request.
        last: True if no other worker follows soon; otherwise, within `workers_ahead`, the next
            one is started now.
    """
    environment = _Environment.now()
    process = _spare.take(kind, job, environment)
    if process is None:
        with job.log.open("ab") as log:
            process = _start([kind, str(job.path)], environment, subprocess.DEVNULL, log.fileno())
    if _spare.wanted and not last:
        _spare.start()
    return process


def _start(arguments: list[str], environment: _Environment, stdin: int, output: int) -> _Process:
    return _starter.submit(
        subprocess.Popen,
        [sys.executable, "-m", WORKER_MODULE, *arguments],
        stdin=stdin,
        stdout=output,
        stderr=subprocess.STDOUT,
        start_new_session=True,
        env=environment.variables,
        cwd=environment.folder,
    ).result()


def end_with_parent(parent: int) -> None:
    """Have this process ended when the thread of `parent` that started it ends (on Linux)."""
    if sys.platform == "linux":
        ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    if os.getppid() != parent:  # it died before that took effect
        os._exit(PREEMPTED_STATUS)


def end_process_tree(process: _Process) -> None:
    """End `process` and every descendant: SIGTERM, then SIGKILL after `GRACE_SECONDS`."""
    with suppress(psutil.NoSuchProcess):
        family = psutil.Process(process.pid).children(recursive=True)
        if process.poll() is None:
            process.terminate()
        with suppress(subprocess.TimeoutExpired):
            process.wait(GRACE_SECONDS)
        for member in family:
            with suppress(psutil.NoSuchProcess):
                member.kill()
    with suppress(ProcessLookupError, PermissionError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()
