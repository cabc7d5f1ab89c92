"""Starting a run of the deployment, and following it until it ends.

A run is started by `prefect deployment run`, exactly as one types it. What happens to it is read
from two places: the states of the run and its tasks from the Prefect server's REST API (so that
following needs none of Prefect's process-wide settings), and the progress of training from the
run's own folder. Following is only looking: ending it ends nothing else.
"""

from __future__ import annotations

import json
import re
import subprocess
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from deployments import services
from deployments.stack import DEPLOYMENT, Stack
from qwen3ft.errors import EnvironmentNotReadyError
from qwen3ft.files import read_json_lines
from qwen3ft.jobs.folders import RunDir
from qwen3ft.machine.environment import EnvironmentManager
from qwen3ft.records.training import TrainingMetrics

FINAL_STATES = ("COMPLETED", "FAILED", "CRASHED", "CANCELLED")
POLL_SECONDS = 0.7
UNREACHABLE_SECONDS = 30.0


@dataclass(frozen=True)
class StateChange:
    """A run or a task of it entered a state; `seconds` is how long it ran, once it ended."""

    name: str
    state: str
    state_type: str
    message: str = ""
    seconds: float | None = None


@dataclass(frozen=True)
class Progress:
    """The newest line of a training attempt's metrics."""

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

    def newest(self) -> Progress | None:
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
        lines, self.offset = read_json_lines(job.metrics, self.offset)
        trained = [line for line in lines if line.get("loss") is not None]
        if not trained:
            return None
        return Progress(self.attempt, self.total_steps, TrainingMetrics.model_validate(trained[-1]))


@dataclass
class Follower:
    """One run that is being looked at.

    Attributes:
        api: The REST API's address, ending in /api.
        flow_run_id: The run.
        tail: Where its training progress is read.
    """

    api: str
    flow_run_id: str
    tail: MetricsTail
    _seen: dict[str, str] = field(default_factory=dict)

    def events(self) -> Iterator[StateChange | Progress]:
        """What happens, as it happens; the last one is the run's final state.

        Raises:
            EnvironmentNotReadyError: the server stopped answering.
        """
        while True:
            run = self._read_run()
            ended = run["state"]["type"] in FINAL_STATES
            if not ended:
                yield from self._change("run", run)
            yield from self._task_changes()
            progress = self.tail.newest()
            if progress is not None and not ended:
                yield progress
            if ended:
                yield from self._change("run", run)
                return
            time.sleep(POLL_SECONDS)

    def _task_changes(self) -> Iterator[StateChange]:
        wanted = {
            "flow_runs": {"id": {"any_": [self.flow_run_id]}},
            "sort": "EXPECTED_START_TIME_ASC",
        }
        for task_run in services.request_json(f"{self.api}/task_runs/filter", wanted) or ():
            for change in self._change(task_run["name"], task_run):
                if change.state not in ("Pending", "Scheduled"):
                    yield change

    def _change(self, name: str, run: Mapping[str, Any]) -> Iterator[StateChange]:
        """The state of `run` if it is another than at the last look, else nothing."""
        state = run.get("state")
        if state is None or self._seen.get(run["id"]) == state["name"]:
            return
        self._seen[run["id"]] = state["name"]
        yield StateChange(
            name=name,
            state=state["name"],
            state_type=state["type"],
            message=state.get("message") or "",
            seconds=run["total_run_time"] if state["type"] in FINAL_STATES else None,
        )

    def _read_run(self) -> dict[str, Any]:
        end = time.monotonic() + UNREACHABLE_SECONDS
        while True:
            run: dict[str, Any] | None = services.request_json(
                f"{self.api}/flow_runs/{self.flow_run_id}"
            )
            if run is not None and run.get("state") is not None:
                return run
            if time.monotonic() > end:
                raise EnvironmentNotReadyError(
                    f"The Prefect server gave no answer for {UNREACHABLE_SECONDS:.0f} s.",
                    why="It was stopped or restarted; the run itself may go on.",
                    next_command="qwen3ft status",
                )
            time.sleep(POLL_SECONDS)


def start_run(stack: Stack, parameters: Mapping[str, Any]) -> str:
    """Run `prefect deployment run qwen3-finetune/default`.

    Args:
        stack: A stack that is up, with the deployment registered.
        parameters: Flow parameters that replace the deployment's.

    Returns:
        The id of the flow run.

    Raises:
        EnvironmentNotReadyError: Prefect refused; its own words are in the error.
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
