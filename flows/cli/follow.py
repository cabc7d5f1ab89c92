"""Start a run of the deployment, and follow it until it ends.

The states of the run and of its tasks come from the Prefect server's REST API, and the progress of
training from the run's own folder. Following only reads: the run goes on when it stops.
"""

from __future__ import annotations

import json
import re
import subprocess
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import typer
from rich.console import Console

from deployments import services
from deployments.services import DEPLOYMENT, Layout
from deployments.stack import Stack
from flows.cli.output import say
from flows.cli.views.run import RunView
from qwen3ft.errors import EnvironmentNotReadyError
from qwen3ft.files import lines_from
from qwen3ft.jobs.folders import RunDir, parse_record
from qwen3ft.machine.environment import EnvironmentManager
from qwen3ft.records.training import TrainingMetrics

_FINAL_STATES = ("COMPLETED", "FAILED", "CRASHED", "CANCELLED")
_POLL_SECONDS = 0.7
_UNREACHABLE_SECONDS = 30.0


@dataclass(frozen=True)
class StateChange:
    """A state that a run or a task entered; `seconds` is how long it ran, if it has ended."""

    name: str
    state: str
    state_type: str
    message: str = ""
    seconds: float | None = None


@dataclass(frozen=True)
class AttemptProgress:
    """Newest line of a training attempt's metrics."""

    attempt: int
    total_steps: int | None
    metrics: TrainingMetrics


@dataclass
class MetricsTail:
    """Reads what was appended to the metrics of a run's newest attempt."""

    run: RunDir
    attempt: int = 0
    total_steps: int | None = None
    offset: int = 0

    def newest(self) -> AttemptProgress | None:
        """The newest training line since the last call, if there is one."""
        jobs = self.run.attempts()
        if not jobs:
            return None
        job = jobs[-1]
        if int(job.path.name) != self.attempt:
            self.attempt, self.offset = int(job.path.name), 0
            self.total_steps = None
        if self.total_steps is None and job.request.exists():
            request = json.loads(job.request.read_text(encoding="utf-8"))
            self.total_steps = request.get("total_steps")
        newest = None
        for line in lines_from(job.metrics, self.offset):
            self.offset = line.end_offset
            metrics = parse_record(line.content, TrainingMetrics)
            if metrics is not None and metrics.loss is not None:  # None: an evaluation
                newest = metrics
        return AttemptProgress(self.attempt, self.total_steps, newest) if newest else None


@dataclass
class Follower:
    """Reader of one run's states and progress.

    Attributes:
        layout: Where the Prefect server is.
        flow_run_id: The run to follow.
        tail: Reader of its training progress.
    """

    layout: Layout
    flow_run_id: str
    tail: MetricsTail
    _seen: dict[str, str] = field(default_factory=dict)

    def events(self) -> Iterator[StateChange | AttemptProgress]:
        """Yield what happens, as it happens; the last event is the run's final state.

        Raises:
            EnvironmentNotReadyError: the server stopped answering.
        """
        while True:
            run = self._read_run()
            ended = run["state"]["type"] in _FINAL_STATES
            if not ended:
                yield from self._change("run", run)
            yield from self._task_changes()
            progress = self.tail.newest()
            if progress is not None and not ended:
                yield progress
            if ended:
                yield from self._change("run", run)
                return
            time.sleep(_POLL_SECONDS)

    def _task_changes(self) -> Iterator[StateChange]:
        wanted = {
            "flow_runs": {"id": {"any_": [self.flow_run_id]}},
            "sort": "EXPECTED_START_TIME_ASC",
        }
        for task_run in self._ask("task_runs/filter", wanted) or ():
            for change in self._change(task_run["name"], task_run):
                if change.state not in ("Pending", "Scheduled"):
                    yield change

    def _change(self, name: str, run: Mapping[str, Any]) -> Iterator[StateChange]:
        """Yield the state of `run` if it has changed since the last poll."""
        state = run.get("state")
        if state is None or self._seen.get(run["id"]) == state["name"]:
            return
        self._seen[run["id"]] = state["name"]
        yield StateChange(
            name=name,
            state=state["name"],
            state_type=state["type"],
            message=state.get("message") or "",
            seconds=run["total_run_time"] if state["type"] in _FINAL_STATES else None,
        )

    def _ask(self, address: str, body: Mapping[str, Any] | None = None) -> Any:
        url = f"{self.layout.url('prefect')}/api/{address}"
        return services.request_json(self.layout.secret, url, body)

    def _read_run(self) -> dict[str, Any]:
        end = time.monotonic() + _UNREACHABLE_SECONDS
        while True:
            run: dict[str, Any] | None = self._ask(f"flow_runs/{self.flow_run_id}")
            if run is not None and run.get("state") is not None:
                return run
            if time.monotonic() > end:
                raise EnvironmentNotReadyError(
                    f"The Prefect server did not answer for {_UNREACHABLE_SECONDS:.0f} s.",
                    why="It was stopped or restarted; the run itself may still be going on.",
                    next_command="qwen3ft status",
                )
            time.sleep(_POLL_SECONDS)


def follow_run(layout: Layout, flow_run_id: str, folder: Path, console: Console) -> StateChange:
    """Show a run on the console until it ends; return its final state.

    Raises:
        EnvironmentNotReadyError: the server stopped answering.
        typer.Exit: the user pressed Ctrl-C; the run goes on.
    """
    follower = Follower(layout, flow_run_id, MetricsTail(RunDir(folder)))
    last = StateChange(name="run", state="Unknown", state_type="")
    try:
        with RunView(console) as view:
            for event in follower.events():
                if isinstance(event, StateChange):
                    last = event
                    view.change(event)
                else:
                    view.progress(event)
    except KeyboardInterrupt:
        say(f"The run goes on. To end it: .venv/bin/prefect flow-run cancel {flow_run_id}")
        raise typer.Exit(130) from None
    return last


def start_run(stack: Stack, parameters: Mapping[str, Any]) -> str:
    """Start a run with `prefect deployment run qwen3-finetune/default`.

    Args:
        stack: A stack that is up, with the deployment registered.
        parameters: Flow parameters that replace the deployment's.

    Returns:
        The id of the flow run.

    Raises:
        EnvironmentNotReadyError: Prefect refused; the error quotes its reason.
    """
    python = EnvironmentManager(stack.root).get_python_executable()
    command = [python, "-m", "prefect", "deployment", "run", DEPLOYMENT]
    if parameters:
        command += ["--params", json.dumps(parameters)]
    done = subprocess.run(
        command,
        cwd=stack.root,
        env=services.environment(stack.layout()),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    found = re.search(r"UUID: ([0-9a-f-]{36})", done.stdout)
    if done.returncode != 0 or found is None:
        raise EnvironmentNotReadyError(
            f"prefect deployment run ended with exit code {done.returncode}.",
            why=services.last_words(done.stdout),
            next_command="qwen3ft status",
        )
    return found.group(1)
