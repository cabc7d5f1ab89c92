"""The local stack: a Prefect server, an MLflow server and one process worker, all on loopback.

    .qwen3ft/secret          what makes requests to the servers the owner's (`deployments.secret`)
    .qwen3ft/stack.json      ports, and the pid and start time of each process
    .qwen3ft/logs/*.log      what they print, appended
    .qwen3ft/prefect/        Prefect's database and cached results
    mlruns/                  MLflow's database and artifacts
    prefect.toml             points a `prefect` typed by hand in this folder at the server, if any

`up` starts only what is down, and two at once are safe. `down` leaves no process, not even those of
a flow run. `deployments.autostart` keeps the stack up.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable, Mapping
from pathlib import Path

import psutil
from pydantic import Field

from deployments import services
from deployments.orphans import end_orphans
from deployments.pages import keep_local
from deployments.processes import (
    MARK,
    SERVICE_MARK,
    ProcessMark,
    find_marked,
    free_port,
    listens,
    start_detached,
    stop,
)
from deployments.secret import digest, make_secret, read_secret
from deployments.services import DEPLOYMENT, SERVERS, SERVICES, TOML_HEADER, Layout, Service
from qwen3ft.disk.files import make_private, write_bytes_atomic, write_json_atomic
from qwen3ft.disk.locks import try_lock
from qwen3ft.errors import EnvironmentNotReadyError
from qwen3ft.machine.environment import EnvironmentManager
from qwen3ft.machine.gpu_holds import GpuHold, gpu_holds
from qwen3ft.records.base import Record
from qwen3ft.text.commands import shell_line

_PREFERRED_PORTS = {"prefect": 4200, "mlflow": 5000}
_START_SECONDS = 180.0
# the worker first: what it was running is reported to the server as ended
_STOP_ORDER: tuple[Service, ...] = ("worker", "mlflow", "prefect")

Say = Callable[[str], None]
"""Receiver of one line for the user for each thing done."""


class StackState(Record):
    """Content of stack.json; a port is 0 until it was chosen."""

    prefect_port: int = 0
    mlflow_port: int = 0
    pids: dict[Service, ProcessMark] = Field(default_factory=dict)
    started: float = Field(
        default=0.0, description="Time at which a process was last started, since the epoch."
    )
    secret: str = Field(
        default="", description="Digest of the secret that the processes were started with."
    )

    def port(self, server: Service) -> int:
        """Return the port of a server."""
        return self.prefect_port if server == "prefect" else self.mlflow_port


class ServiceStatus(Record):
    """One process of the stack."""

    name: Service
    pid: int | None
    healthy: bool
    url: str | None
    log: str


class StackStatus(Record):
    """The services of the stack, its GPUs, and whether the deployment is registered."""

    root: str
    up: bool
    prefect_url: str | None
    mlflow_url: str | None
    mlflow_page: str | None = Field(None, description="Page of MLflow with the table of runs.")
    services: tuple[ServiceStatus, ...]
    deployment: str = DEPLOYMENT
    deployment_registered: bool = False
    schedule_active: bool = False
    gpus: tuple[GpuHold, ...] = ()


class Stack:
    """The stack of one project folder.

    Args:
        root: The project folder; all state is kept below it.
        preferred_ports: First port to try for each server.
    """

    def __init__(
        self, root: Path | None = None, preferred_ports: Mapping[str, int] = _PREFERRED_PORTS
    ) -> None:
        self.root = (root or Path.cwd()).resolve()
        self._folder = self.root / ".qwen3ft"
        self._toml = self.root / "prefect.toml"
        self._lock = self._folder / "stack.lock"  # of the one `up` or `down` at a time
        self._preferred_ports = preferred_ports

    # --- the three verbs ---

    def up(self, say: Say = lambda _: None) -> StackStatus:
        """Start what is down and wait until all of it answers.

        Raises:
            EnvironmentNotReadyError: a process ended or did not answer in time.
        """
        self._start_all(say, unless_stopped=False)
        return self.status()

    def keep_up(self, say: Say) -> bool:
        """Start what ended by accident; return False if `down` ended it.

        Raises:
            EnvironmentNotReadyError: a process ended or did not answer in time.
        """
        return self._start_all(say, unless_stopped=True)

    def _start_all(self, say: Say, *, unless_stopped: bool) -> bool:
        """Start what is down; return False, and start nothing, if `down` ended it on purpose."""
        for folder in (self._folder / "logs", self.root / "mlruns" / "artifacts"):
            folder.mkdir(parents=True, exist_ok=True)
        with try_lock(self._lock, math.inf):
            before, secret = self._read_state(), digest(make_secret(self.root))
            if unless_stopped and not before.pids:
                return False
            if before.pids and before.secret != secret:
                say("Everything is started anew, with a new secret; runs in progress are taken up.")
                for name in _STOP_ORDER:
                    self._stop(name)
            down = [name for name in SERVICES if self._find(name, before) is None]
            if unless_stopped and not down:
                return True  # without asking the servers: one that hangs must not block this
            self._start_servers([name for name in SERVERS if name in down], say)
            self._wait("prefect")
            keep_local(self.layout().prefect_pages)
            for folder in (self._folder, self.root / "mlruns"):
                make_private(folder)  # Prefect copies its pages, and older versions wrote openly
            self._start_worker(before)  # while MLflow, which it does not need yet, still starts
            for name in SERVICES:
                self._wait(name)
            self._write_toml(is_up=True)
        self._announce(down, say)
        return True

    def down(self, say: Say = lambda _: None) -> tuple[Service, ...]:
        """End every process of the stack, runs in progress included; return what was stopped."""
        if not self._folder.exists():
            return ()
        with try_lock(self._lock, math.inf):
            stopped = tuple(name for name in _STOP_ORDER if self._stop(name))
            strays = stop(find_marked(self.root))
            self._write_state(self._read_state().model_copy(update={"pids": {}}))
            self._write_toml(is_up=False)
        for name in stopped:
            say(f"{name} stopped")
        if strays:
            say(f"{strays} process(es) left over from runs stopped")
        return stopped

    def status(self) -> StackStatus:
        """Report what is up, without changing anything."""
        state = self._read_state()
        reports = tuple(self._report(name, state) for name in SERVICES)
        urls = {report.name: report.url for report in reports if report.healthy}
        layout = self._layout(state)
        deployment = services.find_deployment(layout) if "prefect" in urls else None
        return StackStatus(
            root=str(self.root),
            up=all(report.healthy for report in reports),
            prefect_url=urls.get("prefect"),
            mlflow_url=urls.get("mlflow"),
            mlflow_page=services.runs_page(layout) if "mlflow" in urls else None,
            services=reports,
            deployment_registered=deployment is not None,
            schedule_active=any(
                schedule["active"] for schedule in (deployment or {}).get("schedules", ())
            ),
            gpus=gpu_holds(),
        )

    def layout(self) -> Layout:
        """Return where things are; the ports are those last used."""
        return self._layout(self._read_state())

    # --- starting ---

    def _start_servers(self, down: list[Service], say: Say) -> None:
        for name in down:  # children of a killed server may still hold its port and database
            stop(find_marked(self.root, name))
        # whatever is left of the stack, a run in progress too, knows the old addresses
        may_move = not find_marked(self.root)
        for name in down:  # both at once: each needs seconds before it listens
            self._write_state(self._choose_port(name, say, may_move=may_move))
            self._start(name)

    def _start_worker(self, before: StackState) -> None:
        state = self._read_state()
        if self._find("worker", state) is not None:
            if all(state.port(name) == before.port(name) for name in SERVERS):
                return
            self._stop("worker")  # it still talks to the old addresses
        end_orphans(self.layout())
        self._start("worker")

    def _announce(self, started: list[Service], say: Say) -> None:
        # no addresses: what `up --stay` says may go to a log, and they open with the secret only
        for name in started:
            waits = name == "worker"
            say(f"{name:8}{f'waiting for runs of pool {services.POOL}' if waits else 'started'}")

    def _start(self, name: Service) -> None:
        state, layout = self._read_state(), self.layout()
        python = EnvironmentManager(self.root).get_python_executable()
        marks = {MARK: str(self.root), SERVICE_MARK: name}
        process = start_detached(
            services.command(name, layout, python),
            environment=services.environment(layout) | marks,
            folder=self.root,
            log=layout.log(name),
        )
        update = {
            "pids": {**state.pids, name: process},
            "started": time.time(),
            "secret": digest(read_secret(self.root)),
        }
        # at once, so that an `up` that is killed right here does not lose the process
        self._write_state(state.model_copy(update=update))

    def _choose_port(self, name: Service, say: Say, *, may_move: bool) -> StackState:
        """Choose a port: the preferred one where it is free, else the last one used, else the next.

        A stack that is not down altogether keeps its ports.
        """
        state = self._read_state()
        others = [state.port(other) for other in SERVERS if other != name]
        preferred = self._preferred_ports[name]
        last = state.port(name) or preferred
        wanted = preferred if may_move else last
        port = free_port(wanted, taken=others)
        if port != wanted and last != wanted:
            port = free_port(last, taken=others)
        if port != wanted:
            say(f"Port {wanted} is taken; {name} uses {port}.")
        elif port != last:
            say(f"Port {port} is free again; {name} uses it instead of {last}.")
        return state.model_copy(update={f"{name}_port": port})

    def _wait(self, name: Service) -> None:
        state, end = self._read_state(), time.monotonic() + _START_SECONDS
        log = self._layout(state).log(name)
        while not self._report(name, state).healthy:
            ended = self._find(name, state) is None
            if ended or time.monotonic() > end:
                lines = log.read_text(encoding="utf-8", errors="replace").splitlines()
                raise EnvironmentNotReadyError(
                    f"{name} {'ended' if ended else f'did not answer for {_START_SECONDS:.0f} s'}.",
                    why="\n".join(lines[-8:]),
                    next_command=shell_line("tail", "-n", "50", log),
                )
            time.sleep(0.2)

    # --- looking ---

    def _find(self, name: Service, state: StackState) -> psutil.Process | None:
        mark = state.pids.get(name)
        return mark.find() if mark else None

    def _report(self, name: Service, state: StackState) -> ServiceStatus:
        layout, process = self._layout(state), self._find(name, state)
        # another server may be on the port while ours failed to get it: it is not sent the secret
        healthy = (
            process is not None
            and (name not in SERVERS or listens(process, layout.port(name)))
            and services.is_healthy(name, layout, state.pids[name].create_time)
        )
        return ServiceStatus(
            name=name,
            pid=process.pid if process else None,
            healthy=healthy,
            url=layout.url(name) if name in SERVERS else None,
            log=str(layout.log(name)),
        )

    # --- stopping and remembering ---

    def _stop(self, name: Service) -> bool:
        process = self._find(name, self._read_state())
        members = find_marked(self.root, name) + ([process] if process else [])
        count = stop(members)
        if name == "worker":  # while the server still answers
            end_orphans(self.layout())
        return count > 0

    def _layout(self, state: StackState) -> Layout:
        return Layout(self.root, state.prefect_port, state.mlflow_port)

    def _read_state(self) -> StackState:
        try:
            text = (self._folder / "stack.json").read_text(encoding="utf-8")
            return StackState.model_validate(json.loads(text))
        except (FileNotFoundError, ValueError):
            return StackState()  # processes of a lost state are still found by their mark

    def _write_state(self, state: StackState) -> None:
        write_json_atomic(self._folder / "stack.json", state.model_dump(mode="json"))

    def _owns_toml(self) -> bool:
        return not self._toml.exists() or self._toml.read_text("utf-8").startswith(TOML_HEADER)

    def _write_toml(self, *, is_up: bool) -> None:
        if self._owns_toml():
            content = services.prefect_toml(self.layout(), is_up=is_up)
            write_bytes_atomic(self._toml, content.encode())
