"""Workers of tests, forked from a process that has imported what they import.

A worker imports for seconds, and a run starts one for each of its stages and attempts. Here they
share the imports of one process. Otherwise they are what the product starts: children of the
process that asked for them, in a session of their own, with the same environment, folder, umask,
arguments, stdin and log. Tests of how workers start and end take the fixture `cold_workers`.

A process of pytest-xdist imports all that, too, and forks the warm process when it has, before it
reads the first test. Where pytest runs in one process, whose tests may need none of it, this file
is executed with the number of a socket when the first worker is asked for.

Each message is a request as JSON, with the descriptors of stdin and output; the answer is the
worker's process id.
"""

from __future__ import annotations

import ctypes
import faulthandler
import gc
import io
import json
import logging
import os
import runpy
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NoReturn

is_on = True
"""False while workers are started as the product does."""

RECORD_SYNCS = "QWEN3FT_TEST_RECORD_SYNCS"
"""Variable with a folder in which the worker records its syncs; see `benchmarks.kills.power`."""

_MOST_BYTES = 2**17
_PR_SET_CHILD_SUBREAPER = 36

_READ_BY_IMPORTS = ("PYTHON", "HF_", "OMP_", "MKL_", "TRANSFORMERS_", "TOKENIZERS_", "LD_")
"""Beginnings of variables that libraries read when they are imported."""

_forked: tuple[int, socket.socket] | None = None
"""Process id of the warm process that this one has forked, and the socket to it."""


class _WarmProcess:
    """The process that forks workers; unless this one has forked it, it starts when first asked.

    Args:
        variables: Environment in which it imports.
    """

    def __init__(self, variables: dict[str, str]) -> None:
        self._variables = variables
        self._lock = threading.Lock()
        self._pid, self._socket = _forked or (0, None)

    def suits(self, variables: dict[str, str]) -> bool:
        """Tell if a process with these environment variables imports the same."""
        changed = dict(variables.items() ^ self._variables.items())
        return not any(name.startswith(_READ_BY_IMPORTS) for name in changed)

    def fork(self, request: dict[str, Any], stdin: int, output: int) -> int:
        """Fork a worker, whose parent is this process; return its process id."""
        message = json.dumps({**request, "parent": os.getpid()}).encode()
        with self._lock, _adopting():
            if self._socket is None:
                self._pid, self._socket = self._start()
            socket.send_fds(self._socket, [message], [stdin, output])
            return int(self._socket.recv(_MOST_BYTES))

    def _start(self) -> tuple[int, socket.socket]:
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        with theirs:
            theirs.set_inheritable(True)
            pid = os.posix_spawn(
                sys.executable,
                [sys.executable, __file__, str(theirs.fileno())],
                self._variables,
                file_actions=[(os.POSIX_SPAWN_OPEN, 0, os.devnull, os.O_RDONLY, 0)],
            )
        return pid, ours

    def end(self) -> None:
        """End it, if it was started."""
        if self._socket is not None:
            self._socket.close()
            os.kill(self._pid, signal.SIGKILL)
            os.waitpid(self._pid, 0)


def fork_early() -> None:
    """Import what workers need, and fork the warm process; on Linux."""
    from qwen3ft.worker.bootstrap import import_libraries

    global _forked
    if sys.platform != "linux":
        return
    import_libraries("train")
    gc.disable()  # until the tests are collected (tests/conftest.py)
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    pid = os.fork()
    if pid == 0:
        _leave_pytest(theirs.fileno())
    theirs.close()
    _forked = pid, ours


def _leave_pytest(channel: int) -> NoReturn:
    """Keep nothing of pytest's open or changed; then serve at this descriptor."""
    faulthandler.disable()  # pytest's writes to a descriptor that is closed here
    os.dup2(channel, 3)
    os.closerange(4, os.sysconf("SC_OPEN_MAX"))
    logging.root.handlers.clear()
    sys.stdin = sys.__stdin__ = open(0, closefd=False)  # noqa: SIM115
    for name, number in (("stdout", 1), ("stderr", 2)):  # unbuffered, as workers have them
        stream = io.TextIOWrapper(io.FileIO(number, "w", closefd=False), write_through=True)
        setattr(sys, name, stream)
        setattr(sys, f"__{name}__", stream)
    root = Path(__file__).parents[2]
    sys.path[:] = ["", *(path for path in sys.path if Path(path) not in (root, root / "tests"))]
    _serve(socket.socket(fileno=3))
    os._exit(0)


@contextmanager
def _adopting() -> Iterator[None]:
    """Be the parent of what a process below this one leaves when it ends."""
    libc = ctypes.CDLL(None)
    libc.prctl(_PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)
    try:
        yield
    finally:
        libc.prctl(_PR_SET_CHILD_SUBREAPER, 0, 0, 0, 0)


@contextmanager
def forking_workers() -> Iterator[None]:
    """Have `qwen3ft.jobs.processes` start workers here, on Linux."""
    if sys.platform != "linux":
        yield
        return
    import pytest

    from qwen3ft.jobs import processes

    warm, start_cold = _WarmProcess(processes._Environment.now().variables), processes._start

    class Worker(subprocess.Popen[bytes]):
        """A process that the warm one forks."""

        def _execute_child(self, args: Any, *given: Any) -> None:
            _, _, _, _, folder, variables, _, _, _, *pipes = given[:15]
            stdin, _, _, output, _, _ = pipes
            request = {"arguments": args, "folder": folder, "variables": variables}
            request["umask"] = _umask()
            self.pid = warm.fork(request, stdin, output)
            self._child_created = True
            self._close_pipe_fds(*pipes)

    def start(
        arguments: list[str], environment: Any, stdin: int, output: int
    ) -> subprocess.Popen[bytes]:
        if not is_on or not warm.suits(environment.variables):
            return start_cold(arguments, environment, stdin, output)
        return Worker(
            arguments,
            stdin=stdin,
            stdout=output,
            env=environment.variables,
            cwd=environment.folder,
        )

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(processes, "_start", start)
        try:
            yield
        finally:
            warm.end()


def _umask() -> int:
    """Return this process's umask; `os.umask` would change it for other threads."""
    status = Path("/proc/self/status").read_text()
    return int(status.partition("Umask:")[2].split()[0], 8)


def _serve(channel: socket.socket) -> None:
    """Import what workers need; fork one for each request until the socket is closed."""
    from qwen3ft.worker.bootstrap import import_libraries

    sys.path[0] = os.getcwd()  # noqa: PTH109  as `python -m` has it, which workers are started with
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for pytest, which ends this process
    import_libraries("train")
    while True:
        message, descriptors, _, _ = socket.recv_fds(channel, _MOST_BYTES, 2)
        if not message:
            return
        read, write = os.pipe()
        between = os.fork()
        if between == 0:
            worker = os.fork()
            if worker == 0:
                for descriptor in (channel.detach(), read, write):
                    os.close(descriptor)
                _become_worker(json.loads(message), *descriptors)
            os.write(write, str(worker).encode())
            os._exit(0)
        os.waitpid(between, 0)  # from then on the worker is a child of who asked for it
        channel.send(os.read(read, 100))
        for descriptor in (read, write, *descriptors):
            os.close(descriptor)


def _become_worker(request: dict[str, Any], stdin: int, output: int) -> NoReturn:
    """Go on as `python -m qwen3ft.worker` does."""
    while os.getppid() != request["parent"]:
        time.sleep(0.001)
    os.setsid()
    os.umask(request["umask"])
    signal.signal(signal.SIGINT, signal.default_int_handler)
    for number, descriptor in enumerate((stdin, output, output)):
        os.dup2(descriptor, number)
    os.close(stdin)
    os.close(output)
    os.environ.clear()
    os.environ.update(request["variables"])
    os.chdir(request["folder"])
    sys.path[0] = request["folder"]
    sys.argv = ["qwen3ft.worker", *request["arguments"]]
    if records := os.environ.get(RECORD_SYNCS):
        from benchmarks.kills.power import record_syncs

        record_syncs(Path(sys.argv[-1]).parents[1], Path(records))
    status = 1
    try:
        runpy.run_module("qwen3ft.worker", run_name="__main__")
    except SystemExit as end:
        status = int(end.code or 0)
    except BaseException:  # noqa: BLE001  printed as the interpreter would, and it ends here
        sys.excepthook(*sys.exc_info())
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)


if __name__ == "__main__":
    _serve(socket.socket(fileno=int(sys.argv[1])))
