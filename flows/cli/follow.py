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
from datetime import UTC, datetime
from typing import Any

import typer
from rich.console import Console

from deployments import services
from deployments.services import DEPLOYMENT, Layout
from deployments.stack import Stack
from flows.cli.output import say
from flows.cli.tails import AttemptProgress, LockTail, MetricsTail, Remark
from flows.cli.views.run import RunView
from qwen3ft.errors import EnvironmentNotReadyError, RequestError
from qwen3ft.machine.environment import EnvironmentManager
from qwen3ft.records.run_card import ALREADY_DONE
from qwen3ft.text.commands import runnable

_FINAL_STATES = ("COMPLETED", "FAILED", "CRASHED", "CANCELLED")
WAITING_STATES = ("AwaitingConcurrencySlot", "Late")
_POLL_SECONDS = 0.7
_UNREACHABLE_SECONDS = 30.0
_RUN_ID = re.compile(r"[0-9a-f-]{36}")


@dataclass(frozen=True)
class StateChange:
    """A state that a run or a task entered; `seconds` is how long it ran, if it has ended."""

    name: str
    state: str
    state_type: str
    message: str = ""
    seconds: float | None = None


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
    waits: LockTail
    _seen: dict[str, str] = field(default_factory=dict)

    def events(self) -> Iterator[StateChange | Remark | AttemptProgress]:
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
            yield from self.waits.remarks()
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
        for task_run in services.ask_prefect(self.layout, "task_runs/filter", wanted) or ():
            for change in self._change(task_run["name"], task_run):
                if change.state not in ("Pending", "Scheduled"):
                    yield change

    def _change(self, name: str, run: Mapping[str, Any]) -> Iterator[StateChange]:
        """Yield the state of `run` if it has changed since the last poll."""
        state = run.get("state")
        if state is None or self._seen.get(run["id"]) == state["name"]:
            return
        self._seen[run["id"]] = state["name"]
        waits = name == "run" and state["name"] in WAITING_STATES
        yield StateChange(
            name=name,
            state=state["name"],
            state_type=state["type"],
            message=self._reason_to_wait(run) if waits else state.get("message") or "",
            seconds=run["total_run_time"] if state["type"] in _FINAL_STATES else None,
        )

    def _reason_to_wait(self, run: Mapping[str, Any]) -> str:
        """Return which run has the deployment's one slot, or that no worker is there."""
        for other in active_runs(self.layout, run.get("deployment_id")):
            if other["id"] != run["id"] and other["state"]["type"] in ("RUNNING", "PENDING"):
                return f"waits for run {other['id']} ({other['name']}), which is in progress"
        return "no worker has taken it yet"

    def _read_run(self) -> dict[str, Any]:
        end = time.monotonic() + _UNREACHABLE_SECONDS
        while True:
            run: dict[str, Any] | None = services.ask_prefect(
                self.layout, f"flow_runs/{self.flow_run_id}"
            )
            if run is not None and run.get("state") is not None:
                return run
            if time.monotonic() > end:
                raise EnvironmentNotReadyError(
                    f"The Prefect server did not answer for {_UNREACHABLE_SECONDS:.0f} s.",
                    why="It was stopped or restarted; the run itself may still be going on.",
                    next_command="qwen3ft status",
                )
            time.sleep(_POLL_SECONDS)


def active_runs(layout: Layout, deployment_id: str | None) -> list[dict[str, Any]]:
    """Return the runs of a deployment that were started and have not ended, the oldest first."""
    found: list[dict[str, Any]] | None = services.ask_prefect(
        layout,
        "flow_runs/filter",
        {
            "deployments": {"id": {"any_": [deployment_id]}},
            "flow_runs": {
                "state": {"type": {"any_": ["RUNNING", "PENDING", "SCHEDULED"]}},
                "expected_start_time": {"before_": datetime.now(UTC).isoformat()},
            },
            "sort": "EXPECTED_START_TIME_ASC",
        },
    )
    return found or []


def find_run(layout: Layout, wanted: str | None) -> dict[str, Any]:
    """Return the flow run of an id, or the one in progress.

    A run that was resumed is found by its own id: the newest flow run that continues it, even if
    that has ended.

    Raises:
        RequestError: there is no such run, or none is in progress.
    """
    deployment = services.find_deployment(layout)
    if wanted is None:
        active = active_runs(layout, deployment["id"]) if deployment else []
        if not active:
            raise RequestError(
                "No run of the deployment is in progress.",
                why="Runs end by themselves; their cards are in the folder of runs.",
                next_command="qwen3ft run",
            )
        return next((run for run in active if run["state"]["type"] == "RUNNING"), active[0])
    found = _newest_resuming(layout, deployment["id"], wanted) if deployment else None
    if found is None and _RUN_ID.fullmatch(wanted):
        found = services.ask_prefect(layout, f"flow_runs/{wanted}")
    if found is None:
        raise RequestError(
            f"The Prefect server knows no run {wanted[:60]!r}.",
            why="It may be of another folder, of `qwen3ft train`, or removed from the history.",
            next_command="qwen3ft follow",
        )
    return found


def _newest_resuming(layout: Layout, deployment_id: str, run_id: str) -> dict[str, Any] | None:
    """Return the newest of the last 200 flow runs that continues a run."""
    wanted = {
        "deployments": {"id": {"any_": [deployment_id]}},
        "flow_runs": {"expected_start_time": {"before_": datetime.now(UTC).isoformat()}},
        "sort": "EXPECTED_START_TIME_DESC",
    }
    for run in services.ask_prefect(layout, "flow_runs/filter", wanted) or ():
        # One that a busy server asked for twice ended at once.
        if run["parameters"].get("continue_run") == run_id and run["state_name"] != ALREADY_DONE:
            return dict(run)
    return None


def follow_run(
    layout: Layout, flow_run_id: str, tails: tuple[MetricsTail, LockTail], console: Console
) -> StateChange:
    """Show a run on the console until it ends; return its final state.

    Args:
        layout: Where the server is.
        flow_run_id: Its flow run.
        tails: Readers of its folder.
        console: Where it is shown.

    Raises:
        EnvironmentNotReadyError: the server stopped answering.
        typer.Exit: the user pressed Ctrl-C; the run goes on.
    """
    follower = Follower(layout, flow_run_id, *tails)
    last = StateChange(name="run", state="Unknown", state_type="")
    try:
        with RunView(console) as view:
            for event in follower.events():
                if isinstance(event, StateChange):
                    last = event
                    view.change(event)
                elif isinstance(event, Remark):
                    view.remark(event.text)
                else:
                    view.progress(event)
    except KeyboardInterrupt:
        say(f"The run goes on. To watch it again: {runnable('qwen3ft follow')} {flow_run_id}")
        say(f"To end it: {runnable('prefect flow-run cancel')} {flow_run_id}")
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
