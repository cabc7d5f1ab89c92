"""The month's machine: a project folder, its service manager, and the clock that starts nights.

`Machine` acts as the systemd user unit of `qwen3ft up --write-unit`: it runs `qwen3ft up --stay`,
restarts it 3 s after a failure, and ends it when the machine shuts down. `Clock` creates flow runs
as Prefect's scheduler does: tagged, with the hour of the night.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Mapping
from datetime import datetime
from pathlib import Path
from typing import Any
from uuid import uuid4

import psutil
import yaml

from benchmarks import overhead
from benchmarks.machine import ROOT
from deployments import services
from deployments.processes import find_marked, free_port, stop
from deployments.services import DEPLOYMENT
from deployments.stack import Stack, StackState
from qwen3ft import faults
from qwen3ft.disk.files import write_json_atomic
from qwen3ft.errors import EnvironmentNotReadyError

PORTS = {"prefect": 4700, "mlflow": 5700}
RESTART_SECONDS = 3.0
"""RestartSec of the unit."""
STOP_SECONDS = 120.0
FIRST_START_SECONDS = 240.0
ACCEPT_SECONDS = 120.0
"""Time for which a request for a run is repeated."""
ENDED = ("COMPLETED", "FAILED", "CRASHED", "CANCELLED")
FAULTS = "faults.txt"
"""File in the project folder with the faults that the run in progress plants in itself."""
SCHEDULED_TAG = "auto-scheduled"


def make_project(root: Path, settings: Mapping[str, Any]) -> Stack:
    """Make a project folder that runs this checkout's code with these settings on the CPU."""
    overhead.make_project(root)
    config = root / "deployments" / "configs" / "embedded.yaml"
    merged = {**yaml.safe_load(config.read_text(encoding="utf-8")), **settings}
    config.write_text(yaml.safe_dump(merged, allow_unicode=True), encoding="utf-8")
    ports = {f"{name}_port": free_port(port) for name, port in PORTS.items()}
    (root / ".qwen3ft").mkdir()
    state = StackState.model_validate(ports)
    write_json_atomic(root / ".qwen3ft" / "stack.json", state.model_dump(mode="json"))
    return Stack(root)


class Machine:
    """Service manager of the project.

    Attributes:
        restarts: Number of restarts of `qwen3ft up --stay` after failures.
    """

    def __init__(self, stack: Stack) -> None:
        self.stack = stack
        self.restarts = 0
        self._keeper: subprocess.Popen[bytes] | None = None
        self._ended: float | None = None

    def boot(self) -> None:
        """Start the unit without waiting for its services."""
        with (self.stack.root / "keeper.log").open("ab") as log:
            self._keeper = subprocess.Popen(
                [sys.executable, "-m", "qwen3ft", "up", "--stay"],
                cwd=self.stack.root,
                env=self.environment(),
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        self._ended = None

    def wait_until_up(self) -> None:
        """Wait until all services answer.

        Raises:
            EnvironmentNotReadyError: They do not within `FIRST_START_SECONDS`.
        """
        end = time.monotonic() + FIRST_START_SECONDS
        while not self.stack.status().up:
            self.look()
            if time.monotonic() > end:
                log = self.stack.root / "keeper.log"
                raise EnvironmentNotReadyError(
                    "The stack did not come up.", why=log.read_text()[-800:], next_command=""
                )
            time.sleep(0.5)

    def look(self) -> None:
        """Restart the unit if it failed; to be called repeatedly."""
        if self._keeper is None or self._keeper.poll() in (None, 0):
            return
        self._ended = self._ended or time.monotonic()
        if time.monotonic() - self._ended >= RESTART_SECONDS:
            self.restarts += 1
            self.boot()

    def shut_down(self) -> None:
        """Shut down in order: SIGTERM to the unit, then to the remaining processes."""
        if self._keeper is not None:
            self._keeper.terminate()
            try:
                self._keeper.wait(STOP_SECONDS)
            except subprocess.TimeoutExpired:
                self._keeper.kill()
                self._keeper.wait()
            self._keeper = None
        stop(find_marked(self.stack.root))

    def lose_power(self) -> None:
        """Kill everything at once; the unit starts `RESTART_SECONDS` later."""
        processes = find_marked(self.stack.root)
        if self._keeper is not None:
            self._keeper.kill()
            self._keeper.wait()
        kill(processes)
        kill(find_marked(self.stack.root))  # processes that were just being started

    def environment(self) -> dict[str, str]:
        """Return the environment of commands in the project folder, with this checkout's code."""
        paths = [str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
        planted = self.stack.root / FAULTS
        planted.touch()
        return {
            **os.environ,
            "PYTHONPATH": os.pathsep.join(paths),
            "CUDA_VISIBLE_DEVICES": "",
            faults.VARIABLE: f"@{planted}",
        }

    def command(self, *arguments: str) -> subprocess.CompletedProcess[str]:
        """Run `qwen3ft` with these arguments in the project folder."""
        return subprocess.run(
            [sys.executable, "-m", "qwen3ft", *arguments],
            cwd=self.stack.root,
            env=self.environment(),
            capture_output=True,
            text=True,
        )


class Clock:
    """Client of Prefect's API that starts nights as the scheduler does and reads their runs."""

    def __init__(self, stack: Stack) -> None:
        self.stack = stack

    def start(self, hour: datetime, planted: str | None = None) -> str:
        """Create the scheduled run of a night and return its id.

        Args:
            hour: Time at which the run is due.
            planted: Faults in its process; None leaves those of the run in progress.
        """
        body: dict[str, Any] = {
            "state": {
                "type": "SCHEDULED",
                "state_details": {"scheduled_time": hour.isoformat()},
            },
            "tags": [SCHEDULED_TAG],
            "idempotency_key": uuid4().hex,  # repeating the request must not create a second run
        }
        if planted is not None:
            (self.stack.root / FAULTS).write_text(planted, encoding="utf-8")
        return self._create(body)

    def run(self, parameters: Mapping[str, Any]) -> str:
        """Create a run that is due now, as a person does, and return its id."""
        return self._create({"parameters": parameters, "idempotency_key": uuid4().hex})

    def _create(self, body: Mapping[str, Any]) -> str:
        end = time.monotonic() + ACCEPT_SECONDS
        while time.monotonic() < end:
            found = self._ask(f"deployments/name/{DEPLOYMENT}")
            address = f"deployments/{(found or {}).get('id')}/create_flow_run"
            if run := found and self._ask(address, body):
                return str(run["id"])
            time.sleep(1.0)
        raise EnvironmentNotReadyError(
            f"The Prefect server has not accepted a run for {ACCEPT_SECONDS:.0f} s.",
            why="It is down or overloaded.",
            next_command=f"tail -n 50 {self.stack.layout().log('prefect')}",
        )

    def runs(self) -> list[dict[str, Any]] | None:
        """Return every flow run on the server, oldest first; None while it does not answer."""
        body = {"sort": "EXPECTED_START_TIME_ASC", "limit": 200}
        found = self._ask("flow_runs/filter", body)
        if found is None:
            return None
        return sorted(found, key=lambda run: str(run["created"]))

    def _ask(self, address: str, body: Mapping[str, Any] | None = None) -> Any:
        layout = self.stack.layout()
        url = f"{layout.url('prefect')}/api/{address}"
        return services.request_json(layout.secret, url, body)


def kill(processes: list[psutil.Process]) -> int:
    """Send SIGKILL; return the number of processes hit."""
    return sum(_send(process, signal.SIGKILL) for process in processes)


def pause(processes: list[psutil.Process]) -> int:
    """Send SIGSTOP, so that they answer nothing; return the number of processes hit."""
    return sum(_send(process, signal.SIGSTOP) for process in processes)


def resume(processes: list[psutil.Process]) -> int:
    """Send SIGCONT; return the number of processes hit."""
    return sum(_send(process, signal.SIGCONT) for process in processes)


def _send(process: psutil.Process, number: int) -> bool:
    try:
        process.send_signal(number)
    except psutil.NoSuchProcess:
        return False
    return True
