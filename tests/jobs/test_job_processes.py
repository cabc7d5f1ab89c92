"""Idle workers are used, replaced if their environment differs, and never left behind."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import psutil
import pytest

from qwen3ft.errors import FinetuneError
from qwen3ft.jobs import processes
from qwen3ft.jobs.folders import JobDir
from qwen3ft.jobs.guard import guarded
from qwen3ft.jobs.launcher import run_worker
from qwen3ft.jobs.processes import workers_ahead
from qwen3ft.records.training import AttemptOutcome

WAITING = "qwen3ft-wait"

pytestmark = pytest.mark.usefixtures("cold_workers")


@pytest.fixture
def ask(tmp_path: Path) -> Iterator[Callable[..., set[int]]]:
    """Give a worker a job with an unreadable request; return the ids of the workers that had it.

    No job needs fewer imports; a job that succeeds in such a worker is in tests/flows/test_flow.py.
    """
    number = iter(range(100))

    def run(*, last: bool = False) -> set[int]:
        job = JobDir(tmp_path / f"job-{next(number)}")
        job.path.mkdir()
        job.request.write_text("{}")
        seen: set[int] = set()

        def look() -> None:
            names = {process.pid: _name(process) for process in _children()}
            waits = (WAITING, "python")  # also one that has not given itself a name yet
            seen.update(pid for pid, name in names.items() if not name.startswith(waits))

        with looking(look), pytest.raises(FinetuneError, match="DataRequest"):
            run_worker("data", job, AttemptOutcome, stall_seconds=60, last=last)
        assert "DataRequest" in job.log.read_text()  # whoever had it, its output is in the log
        return seen

    yield run
    assert not _children()


@contextmanager
def looking(look: Callable[[], None]) -> Iterator[None]:
    """Call `look` again and again while the body runs."""
    ended = threading.Event()

    def watch() -> None:
        while not ended.wait(0.05):
            look()

    thread = threading.Thread(target=watch)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()


def _children() -> list[psutil.Process]:
    found = psutil.Process().children(recursive=True)
    return [child for child in found if "qwen3ft.worker" in _command(child)]


def _waiting() -> psutil.Process:
    """The idle worker, once it has named itself."""
    end = time.monotonic() + 30
    while time.monotonic() < end:
        found = [child for child in _children() if _name(child) == WAITING]
        if found:
            (process,) = found
            return process
        time.sleep(0.05)
    raise AssertionError("no worker waits")


def _command(process: psutil.Process) -> list[str]:
    try:
        return process.cmdline()
    except psutil.NoSuchProcess:
        return []


def _name(process: psutil.Process) -> str:
    try:
        return process.name()
    except psutil.NoSuchProcess:
        return "python"


def test_the_worker_that_waits_gets_the_job_and_another_one_waits(
    ask: Callable[..., set[int]],
) -> None:
    """Each job starts the next worker while it runs; the last job starts none."""
    with workers_ahead():
        first = _waiting()
        assert ask() == {first.pid}
        second = _waiting()
        assert second.pid != first.pid
        assert ask(last=True) == {second.pid}
        assert not _children()


def test_without_the_context_no_worker_waits(ask: Callable[..., set[int]]) -> None:
    """A command that needs one worker starts one."""
    assert len(ask()) == 1
    assert not _children()


def test_a_worker_of_another_environment_is_not_used(
    ask: Callable[..., set[int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A job runs in the environment of its start, with its GPU and its planted faults."""
    with workers_ahead():
        waiting = _waiting()
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "7")
        assert waiting.pid not in ask(last=True)
        assert not waiting.is_running()


def test_a_worker_that_died_while_it_waited_is_replaced(ask: Callable[..., set[int]]) -> None:
    """Whatever killed it, the job gets a new one."""
    with workers_ahead():
        waiting = _waiting()
        waiting.kill()
        waiting.wait(5)
        assert len(ask(last=True) - {waiting.pid}) == 1


def test_no_worker_waits_where_memory_is_short(
    ask: Callable[..., set[int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The memory of a small machine belongs to the job."""
    monkeypatch.setattr("qwen3ft.jobs.processes.LEAST_FREE_BYTES", 2**60)
    with workers_ahead():
        assert len(ask()) == 1
        assert not _children()


def test_a_worker_that_waits_dies_with_its_parent() -> None:
    """SIGKILL of the flow's process ends it too, although another thread started it."""
    program = (
        "import threading, time; from qwen3ft.jobs.processes import workers_ahead;"
        "ahead = workers_ahead(); t = threading.Thread(target=ahead.__enter__); t.start();"
        "t.join(); print('ready', flush=True); time.sleep(600)"
    )
    parent = subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE)
    try:
        assert parent.stdout is not None
        assert parent.stdout.readline() == b"ready\n"
        (worker,) = psutil.Process(parent.pid).children()
        time.sleep(1.0)  # the thread that asked for it is gone, and it goes on
        assert worker.is_running()
        parent.kill()
        parent.wait()
        psutil.wait_procs([worker], timeout=5)
        assert not worker.is_running() or worker.status() == psutil.STATUS_ZOMBIE
    finally:
        parent.kill()
        parent.wait()


@pytest.mark.parametrize(
    ("held", "first"),
    [(None, "0"), ("", ""), ("3", "3"), ("GPU-b,GPU-a", "GPU-b"), ("-1", "-1")],
)
def test_a_worker_sees_one_gpu_and_knows_of_the_others(
    monkeypatch: pytest.MonkeyPatch, held: str | None, first: str
) -> None:
    """The first of the run's; transformers would put a copy of the model on each that it sees."""
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    if held is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", held)
    variables = processes._Environment.now().variables
    assert variables["CUDA_VISIBLE_DEVICES"] == first
    assert variables[processes.HELD_VARIABLE] == (held or "")


@pytest.mark.skipif(not hasattr(os, "sched_getaffinity"), reason="the system binds no process")
def test_a_worker_has_threads_for_cores_it_may_use(monkeypatch: pytest.MonkeyPatch) -> None:
    """One is left to others, of those that a container or taskset leaves, not of the machine's."""
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.setattr(os, "cpu_count", lambda: 32)
    for usable, threads in ({1}, "1"), ({0, 5}, "1"), ({0, 5, 6, 7}, "3"):
        monkeypatch.setattr(os, "sched_getaffinity", lambda _, usable=usable: usable)
        assert processes._Environment.now().variables["OMP_NUM_THREADS"] == threads


def test_a_guarded_program_ends_with_its_own_words_and_status() -> None:
    """Though the guard still waits for the end of its stdin, in another thread."""
    command = guarded([sys.executable, "-c", "raise SystemExit('bad luck')"])
    with subprocess.Popen(command, stdin=subprocess.PIPE, stderr=subprocess.PIPE) as guard:
        assert guard.stderr is not None
        assert guard.stderr.read() == b"bad luck\n"
        assert guard.wait() == 1
