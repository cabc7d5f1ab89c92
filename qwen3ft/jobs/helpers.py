"""Helpers of a process: copies of it that work on batches, each on a core of its own.

They are forked. So they share what the process has loaded, a tokenizer above all, instead of
loading and holding it once more. A helper ends with its process, however that ends; one that dies
ends the work with an error. Where forking is not safe, the work is done in place.
"""

from __future__ import annotations

import gc
import multiprocessing
import os
import signal
import sys
import threading
import warnings
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from multiprocessing.connection import Connection
from multiprocessing.context import ForkProcess
from typing import Any, NamedTuple, TypeVar

from qwen3ft.errors import FinetuneError
from qwen3ft.jobs.failures import translate, translate_exit
from qwen3ft.jobs.launcher import kernel_oom_kills
from qwen3ft.jobs.processes import STARTER_NAME, end_with_parent
from qwen3ft.logs import get_logger

MOST_HELPERS = 4
"""Beyond that, the process that gives them their batches is what takes the time."""

TASKS_AHEAD = 2
"""Tasks that each helper has, one of which waits for it."""

END_SECONDS = 10.0
"""Longest wait for the end of a helper that was killed or has died."""

Task = TypeVar("Task")
Result = TypeVar("Result")


class _Helper(NamedTuple):
    process: ForkProcess
    connection: Connection


class Helpers:
    """Helpers that know one object, `work`, and call its methods; made by `start_helpers`."""

    def __init__(self, work: object, phase: str) -> None:
        self._work, self._phase = work, phase
        self._helpers: list[_Helper] = []
        self._kills_before = kernel_oom_kills()

    def __len__(self) -> int:
        return len(self._helpers)

    def map(self, method: Callable[[Task], Result], tasks: Iterable[Task]) -> Iterator[Result]:
        """Yield the results of `method`, one of the object's, for all tasks, in their order.

        Tasks are taken `TASKS_AHEAD` for each helper before the first result is given.

        Raises:
            FinetuneError: as `method` raises, or a helper has died.
        """
        if not self._helpers:
            yield from map(method, tasks)
            return
        busy: deque[_Helper] = deque()
        for number, task in enumerate(tasks):
            if len(busy) == TASKS_AHEAD * len(self._helpers):
                yield self._receive(busy.popleft())
            helper = self._helpers[number % len(self._helpers)]
            self._send(helper, (method.__name__, task))
            busy.append(helper)
        while busy:
            yield self._receive(busy.popleft())

    def _send(self, helper: _Helper, message: Any) -> None:
        try:
            helper.connection.send(message)
        except OSError as error:
            raise self._death(helper) from error

    def _receive(self, helper: _Helper) -> Any:
        try:
            answer = helper.connection.recv()
        except (EOFError, OSError) as error:
            raise self._death(helper) from error
        if isinstance(answer, FinetuneError):
            raise answer
        return answer

    def _death(self, helper: _Helper) -> FinetuneError:
        helper.process.join(END_SECONDS)
        return translate_exit(
            helper.process.exitcode or 0,
            "",
            oom_kills=kernel_oom_kills() - self._kills_before,
            phase=self._phase,
        )

    def start(self, count: int) -> None:
        """Fork `count` helpers."""
        context = multiprocessing.get_context("fork")
        gc.freeze()  # or each process would search all that was imported for garbage, and copy it
        for _ in range(count):
            ours, theirs = context.Pipe()
            earlier = [helper.connection for helper in self._helpers]
            process = context.Process(
                target=self._serve, args=(theirs, [*earlier, ours], os.getpid()), daemon=True
            )
            with warnings.catch_warnings():
                # Python warns of the idle threads of numpy's BLAS, which forks them anew itself.
                warnings.simplefilter("ignore", DeprecationWarning)
                process.start()
            theirs.close()
            self._helpers.append(_Helper(process, ours))

    def end(self) -> None:
        """End the helpers at once; they have nothing to lose."""
        for helper in self._helpers:
            helper.connection.close()
            helper.process.kill()
        for helper in self._helpers:
            helper.process.join(END_SECONDS)
        self._helpers.clear()

    def _serve(self, connection: Connection, others: list[Connection], parent: int) -> None:
        """Work on tasks until the process that gives them closes its end."""
        for other in others:  # an end that is open here would never look closed to its helper
            other.close()
        end_with_parent(parent)
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the parent, which ends this
        # Each helper has a core; and the threads of the process that was forked are not here.
        os.environ["TOKENIZERS_PARALLELISM"] = "false"
        while True:
            try:
                name, task = connection.recv()
            except (EOFError, OSError):
                return
            connection.send(self._answer(name, task))

    def _answer(self, name: str, task: Any) -> Any:
        try:
            return getattr(self._work, name)(task)
        except FinetuneError as error:
            return error
        except Exception as error:  # noqa: BLE001  whatever it is, the parent has to know it
            get_logger("helper").exception("a helper failed in %s", name)
            return translate(error, self._phase)


@contextmanager
def start_helpers(work: object, *, wanted: bool, phase: str) -> Iterator[Helpers]:
    """Start a helper for each core, up to `MOST_HELPERS`, and end them when the body is left.

    Args:
        work: Object whose methods are to be called, as it is now; each helper has its own copy.
        wanted: False to do all work in this process, as for little of it.
        phase: Name of the work in errors.
    """
    helpers = Helpers(work, phase)
    try:
        if wanted and _can_fork():
            cores = len(os.sched_getaffinity(0))
            helpers.start(min(cores, MOST_HELPERS) if cores > 1 else 0)
        yield helpers
    finally:
        helpers.end()


def _can_fork() -> bool:
    """Return whether a copy of this process would work as it does."""
    # A lock that another thread holds at that moment stays locked in the copy.
    running = {thread.name for thread in threading.enumerate() if not _is_idle(thread)}
    return sys.platform == "linux" and running == {threading.main_thread().name}


def _is_idle(thread: threading.Thread) -> bool:
    return thread.name.startswith(STARTER_NAME)  # waits for the next worker to start
