"""Tests of helpers: order, errors, and that none outlives its process."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator

import psutil
import pytest

from qwen3ft.errors import ConfigError, OutOfMemoryError, WorkerCrashedError
from qwen3ft.jobs import helpers as helpers_module
from qwen3ft.jobs.helpers import Helpers, start_helpers


class Work:
    """What helpers are asked for here."""

    def double(self, number: int) -> int:
        """Return twice the number, after a while."""
        time.sleep(0.02 * (number % 3))
        return 2 * number

    def where(self, number: int) -> tuple[int, int]:
        """Return where this ran."""
        return number, os.getpid()

    def refuse(self, number: int) -> int:
        """Raise an error of this project."""
        if number == 5:
            raise ConfigError(f"{number} is odd.", why="It is.", next_command="qwen3ft doctor")
        return number

    def exhaust(self, _: int) -> int:
        """Run out of memory."""
        raise MemoryError("Unable to allocate 3.0 GiB for an array")

    def die(self, number: int) -> int:
        """Die of a signal."""
        if number == 3:
            os.kill(os.getpid(), signal.SIGKILL)
        return number

    def send_much(self, number: int) -> bytes:
        """Return more than a pipe holds."""
        return bytes(3_000_000 + number)


@pytest.fixture
def two(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[], Helpers]]:
    """Start two helpers, whatever cores and threads this process has."""
    monkeypatch.setattr(helpers_module, "_can_fork", lambda: True)
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {0, 1})
    with start_helpers(Work(), wanted=True, phase="data") as helpers:
        assert len(helpers) == 2
        yield lambda: helpers


def children() -> list[psutil.Process]:
    return psutil.Process().children(recursive=True)


def test_results_come_in_the_order_of_the_tasks_from_both(two: Callable[[], Helpers]) -> None:
    work, helpers = Work(), two()
    assert list(helpers.map(work.double, range(23))) == [2 * n for n in range(23)]
    found = list(helpers.map(work.where, range(9)))
    assert [number for number, _ in found] == list(range(9))
    assert len({process for _, process in found} - {os.getpid()}) == 2
    assert [len(part) for part in helpers.map(work.send_much, range(6))] == [
        3_000_000 + n for n in range(6)
    ]


def test_errors_come_where_their_task_would_have_failed(two: Callable[[], Helpers]) -> None:
    results = two().map(Work().refuse, range(9))
    assert [next(results) for _ in range(5)] == [0, 1, 2, 3, 4]
    with pytest.raises(ConfigError, match="5 is odd"):
        next(results)


def test_what_a_helper_raises_is_classified(two: Callable[[], Helpers]) -> None:
    with pytest.raises(OutOfMemoryError, match=r"phase: data"):
        list(two().map(Work().exhaust, range(2)))


def test_a_killed_helper_ends_the_work_and_leaves_nothing_behind(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(helpers_module, "_can_fork", lambda: True)
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {0, 1, 2})
    before = {child.pid for child in children()}
    with (
        pytest.raises(WorkerCrashedError, match=r"killed by SIGKILL \(phase: data\)") as raised,
        start_helpers(Work(), wanted=True, phase="data") as helpers,
    ):
        list(helpers.map(Work().die, range(100)))
    assert raised.value.next_command
    assert {child.pid for child in children()} <= before


def test_helpers_end_with_the_process_that_started_them() -> None:
    script = (
        "import os, sys, time\n"
        "from qwen3ft.jobs.helpers import start_helpers\n"
        "class Work:\n"
        "    def wait(self, _):\n"
        "        time.sleep(600)\n"
        "os.sched_getaffinity = lambda _: {0, 1}\n"
        "with start_helpers(Work(), wanted=True, phase='data') as helpers:\n"
        "    print([p.process.pid for p in helpers._helpers], flush=True)\n"
        "    list(helpers.map(Work().wait, [1, 2]))\n"
    )
    with subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        started = json.loads(process.stdout.readline())
        assert len(started) == 2
        process.kill()
    deadline = time.monotonic() + 120
    while any(_runs(pid) for pid in started):
        assert time.monotonic() < deadline
        time.sleep(0.05)


def _runs(pid: int) -> bool:
    try:
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def test_work_is_done_in_place_beside_other_threads_and_where_it_is_little(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    here = os.getpid()
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {0, 1})
    with start_helpers(Work(), wanted=False, phase="data") as helpers:
        assert {process for _, process in helpers.map(Work().where, [1, 2])} == {here}
    end = threading.Event()
    thread = threading.Thread(target=end.wait)
    thread.start()
    try:
        with start_helpers(Work(), wanted=True, phase="data") as helpers:
            assert {process for _, process in helpers.map(Work().where, [1, 2])} == {here}
    finally:
        end.set()
        thread.join()


def test_a_process_of_one_core_has_no_helpers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(helpers_module, "_can_fork", lambda: True)
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {0})
    with start_helpers(Work(), wanted=True, phase="data") as helpers:
        assert len(helpers) == 0
