"""Processes that outlive the command that started them: start, find and end them.

A process belongs to the stack of a project folder if its environment says so (`MARK`). Children
inherit that, so a flow run, its GPU workers and the remains of a killed server are all found, even
if their parents are gone.
"""

from __future__ import annotations

import os
import socket
import subprocess
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import psutil

from qwen3ft.disk.files import PRIVATE_UMASK
from qwen3ft.records.base import Record

MARK = "QWEN3FT_STACK"
SERVICE_MARK = "QWEN3FT_SERVICE"
_TERM_SECONDS = 10.0
_START_TIME_TOLERANCE_SECONDS = 2.0
"""Linux derives start times from the boot time, which moves a little when the clock is set."""


class ProcessMark(Record):
    """A pid with the process's start time, because pids are reused."""

    pid: int
    create_time: float
    """Seconds since the epoch."""
    boot_seconds: float | None = None
    """Seconds since the boot, which stay the same when the clock is set; None in older files."""
    boot_id: str = ""

    def find(self) -> psutil.Process | None:
        """Return the process if it is alive and not a zombie."""
        try:
            process = psutil.Process(self.pid)
            return process if self._is(process) and process.status() != "zombie" else None
        except psutil.NoSuchProcess:
            return None

    def _is(self, process: psutil.Process) -> bool:
        if self.boot_seconds is None:
            apart = process.create_time() - self.create_time
        else:
            apart = _boot_seconds(process) - self.boot_seconds
        return abs(apart) < _START_TIME_TOLERANCE_SECONDS and self.boot_id in ("", _boot_id())


def _mark(process: psutil.Process) -> ProcessMark:
    """Return the mark by which the process is found again."""
    return ProcessMark(
        pid=process.pid,
        create_time=process.create_time(),
        boot_seconds=_boot_seconds(process),
        boot_id=_boot_id(),
    )


def _boot_seconds(process: psutil.Process) -> float:
    return process.create_time() - psutil.boot_time()


def _boot_id() -> str:
    """Return what differs after every boot; '' where the system does not tell."""
    path = Path("/proc/sys/kernel/random/boot_id")
    return path.read_text().strip() if path.exists() else ""


def start_detached(
    command: Sequence[str], *, environment: Mapping[str, str], folder: Path, log: Path
) -> ProcessMark:
    """Start `command` in a session of its own; append its output to the file `log`.

    What it and its children write, only this user can read.
    """
    descriptor = os.open(log, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o600)
    with os.fdopen(descriptor, "ab") as stream:
        process = subprocess.Popen(
            command,
            cwd=folder,
            env=dict(environment),
            stdin=subprocess.DEVNULL,
            stdout=stream,
            stderr=subprocess.STDOUT,
            start_new_session=True,
            umask=PRIVATE_UMASK,
        )
    return _mark(psutil.Process(process.pid))


def find_marked(root: Path, service: str | None = None) -> list[psutil.Process]:
    """Return all living processes of the stack of `root`, or of one of its services."""
    found = []
    for process in psutil.process_iter():
        try:
            environment = process.environ()
            zombie = process.status() == psutil.STATUS_ZOMBIE
        except (psutil.NoSuchProcess, psutil.AccessDenied, psutil.ZombieProcess, OSError):
            continue
        mine = environment.get(MARK) == str(root)
        if mine and not zombie and service in (None, environment.get(SERVICE_MARK)):
            found.append(process)
    return found


def listens(process: psutil.Process, port: int) -> bool:
    """Check whether `process` or a child of it accepts connections on `port`."""
    for member in [process, *process.children(recursive=True)]:
        try:
            connections = member.net_connections(kind="tcp")
        except (psutil.NoSuchProcess, psutil.AccessDenied):
            continue
        if any(
            connection.status == psutil.CONN_LISTEN and connection.laddr.port == port
            for connection in connections
        ):
            return True
    return False


def stop(processes: Iterable[psutil.Process], seconds: float = _TERM_SECONDS) -> int:
    """End processes and all their descendants: SIGTERM, then SIGKILL after `seconds`.

    Returns:
        How many there were.
    """
    targets = {member.pid: member for process in processes for member in _family(process)}
    for process in targets.values():
        _send(process, kill=False)
    _, alive = psutil.wait_procs(targets.values(), timeout=seconds)
    for process in alive:
        for member in _family(process):
            _send(member, kill=True)
    psutil.wait_procs(alive, timeout=seconds)
    return len(targets)


def _family(process: psutil.Process) -> list[psutil.Process]:
    try:
        return [process, *process.children(recursive=True)]
    except psutil.NoSuchProcess:
        return []


def _send(process: psutil.Process, *, kill: bool) -> None:
    try:
        process.kill() if kill else process.terminate()
    except psutil.NoSuchProcess:
        return


def free_port(preferred: int, taken: Iterable[int] = ()) -> int:
    """Return the first port from `preferred` on that nothing on this machine uses."""
    excluded = set(taken)
    return next(
        port
        for port in range(preferred, 65536)
        if port not in excluded and not _answers(port) and _can_bind(port)
    )


def _answers(port: int) -> bool:
    # some systems let a socket bind to loopback although another listens on all addresses
    with socket.socket() as client:
        client.settimeout(0.5)
        return client.connect_ex(("127.0.0.1", port)) == 0


def _can_bind(port: int) -> bool:
    with socket.socket() as server:
        server.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            server.bind(("127.0.0.1", port))
        except OSError:
            return False
    return True
