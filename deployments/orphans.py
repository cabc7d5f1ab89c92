"""Runs that the server believes to be running although no process executes them any more.

Prefect's worker reports that a run's process ended. When both end together (a power cut, `down`,
the kernel's OOM killer) nobody does: the run would stay Running and keep the one concurrency slot,
so that no later run could start. So does a run whose process ends with status 0 and reports
nothing. `up`, `down` and, every 30 s, the worker therefore end such runs, and start the run that
continues each.
"""

from __future__ import annotations

from collections.abc import Container, Mapping
from pathlib import Path
from typing import Any

import psutil

from deployments import services
from deployments.automations import PROCESS_LOST, resumption_parameters
from deployments.prefect_api import read_deployment
from deployments.processes import find_marked
from deployments.services import POOL, Layout
from qwen3ft.config import TrainingConfig, in_home, merge_settings
from qwen3ft.errors import EnvironmentNotReadyError
from qwen3ft.jobs.folders import RunDir

_UNFINISHED = ("PENDING", "RUNNING", "CANCELLING")


def end_orphans(layout: Layout) -> None:
    """End every run that no process executes; call it only while no worker is up."""
    # The automations of `deploy` do both as well, but not reliably at this moment: a server that
    # has just started holds back an event for 15 minutes if it follows one from before the start,
    # and a server that is about to end may not get to it.
    for run in find_orphans(layout):
        end_run(layout, run, "Its process and the worker ended together.")


def find_orphans(layout: Layout) -> list[dict[str, Any]]:
    """Return the unfinished runs of the pool that no process executes.

    Runs of other origin (`qwen3ft train`) have no pool. A run that a worker is about to start is
    among them.
    """
    alive = _executing(layout.root)
    wanted = {
        "work_pools": {"name": {"any_": [POOL]}},
        "flow_runs": {"state": {"type": {"any_": _UNFINISHED}}},
    }
    found = services.ask_prefect(layout, "flow_runs/filter", wanted)
    return [run for run in found or () if run["id"] not in alive]


class OrphanSweep:
    """A search, repeated while a worker is up, for runs that nobody executes any more."""

    def __init__(self) -> None:
        self._suspects: dict[str, str] = {}

    def repeat(self, layout: Layout, starting: Container[str]) -> None:
        """End the runs found now and the time before in the same state.

        The first time a run is found, its process may just be ending or starting; the worker names
        in `starting` those that it is about to start.
        """
        found = [run for run in find_orphans(layout) if run["id"] not in starting]
        for run in found:
            if self._suspects.get(run["id"]) == run["state_id"]:
                end_run(layout, run, "Its process ended without reporting how.")
        self._suspects = {run["id"]: run["state_id"] for run in found}


def end_run(layout: Layout, run: Mapping[str, Any], message: str) -> None:
    """Mark a run as crashed, and continue it; one that was being cancelled is cancelled.

    A server that does not answer leaves it as it is.
    """
    try:
        deployment = read_deployment(layout)
    except EnvironmentNotReadyError:  # it may answer the next search
        return
    if run["state_type"] == "CANCELLING":
        state = {"type": "CANCELLED", "message": message}
    elif not has_begun(layout.root, run, deployment):
        # under the name Crashed the automation would take it up
        message = f"{message} It had not begun, so it is not taken up."
        state = {"type": "CRASHED", "name": PROCESS_LOST, "message": message}
    else:
        # continue first: if this is killed between the two, the next `up` repeats both
        name = PROCESS_LOST if _continue(layout, run, deployment) else "Crashed"
        message = f"{message} Its checkpoints are kept."
        state = {"type": "CRASHED", "name": name, "message": message}
    services.ask_prefect(layout, f"flow_runs/{run['id']}/set_state", {"state": state})


def _continue(layout: Layout, run: Mapping[str, Any], deployment: Mapping[str, Any] | None) -> bool:
    """Start a run that continues `run`, as the automation does after a crash."""
    if (run["parameters"].get("resumed") or 0) > 1:
        return False  # the flow would have refused to go on, and did not even begin
    if deployment is None or run["deployment_id"] != deployment["id"]:
        return False
    asked = {"parameters": resumption_parameters(run)}
    address = f"deployments/{deployment['id']}/create_flow_run"
    return services.ask_prefect(layout, address, asked) is not None


def has_begun(root: Path, run: Mapping[str, Any], deployment: Mapping[str, Any] | None) -> bool:
    """Return True if the run that a flow run executes has written its settings."""
    given = run["parameters"]
    # what a run was not given is the deployment's, as in `flows.parameters`
    usual = ((deployment or {}).get("parameters") or {}).get("config") or {}
    settings = merge_settings(usual, given.get("config") or {})
    runs_dir = in_home(settings.get("runs_dir") or TrainingConfig().runs_dir)
    return RunDir(root / runs_dir / (given.get("continue_run") or run["id"])).config.is_file()


def _executing(root: Path) -> set[str]:
    """Return the ids of the flow runs that processes of a worker, even a killed one, execute."""
    ids = set()
    for process in find_marked(root, "worker"):
        try:
            ids.add(process.environ().get("PREFECT__FLOW_RUN_ID", ""))
        except (psutil.NoSuchProcess, psutil.AccessDenied):
            continue
    return ids
