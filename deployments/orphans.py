"""Runs that the server takes for running although no process executes them any more.

Prefect's worker reports that a run's process ended; when worker and process end together (a power
cut, `down`, the kernel's OOM killer) nobody does. Such a run would stay Running, and keep the one
concurrency slot, so that no later run ever started. `up` and `down` end such runs here at once, and
ask for the run that takes them up; the automations that `deploy` adds do both while nobody is
looking. They are not relied on here: a server that has just been started holds back an event for
15 minutes if it follows one from before its start, and one that is about to end may not get to it.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import psutil

from deployments import services
from deployments.automations import PROCESS_LOST, resumption_parameters
from deployments.processes import find_marked
from deployments.services import POOL, Layout
from deployments.stack_records import DEPLOYMENT

UNFINISHED = ("PENDING", "RUNNING", "CANCELLING")


def end_orphans(layout: Layout) -> int:
    """Mark as crashed, and take up, every unfinished run of the pool that no process executes.

    To be called while no worker is up. Runs of other origin (`qwen3ft train`) have no pool.

    Returns:
        How many there were.
    """
    alive = _executing(layout.root)
    api = f"{layout.url('prefect')}/api"
    wanted = {
        "work_pools": {"name": {"any_": [POOL]}},
        "flow_runs": {"state": {"type": {"any_": UNFINISHED}}},
    }
    orphans: list[dict[str, Any]] = [
        run
        for run in services.request_json(f"{api}/flow_runs/filter", wanted) or ()
        if run["id"] not in alive
    ]
    message = "Its process ended together with the worker. Its checkpoints are kept."
    for run in orphans:
        # in this order: killed between the two, the next `up` does both again
        name = PROCESS_LOST if _take_up(api, run) else "Crashed"
        state = {"type": "CRASHED", "name": name, "message": message}
        services.request_text(f"{api}/flow_runs/{run['id']}/set_state", {"state": state})
    return len(orphans)


def _take_up(api: str, run: Mapping[str, Any]) -> bool:
    """Ask for the run that goes on where `run` ended, as the automation does after a crash."""
    deployment = services.request_json(f"{api}/deployments/name/{DEPLOYMENT}")
    if deployment is None or run["deployment_id"] != deployment["id"]:
        return False
    address = f"{api}/deployments/{deployment['id']}/create_flow_run"
    return services.request_json(address, {"parameters": resumption_parameters(run)}) is not None


def _executing(root: Path) -> set[str]:
    """Ids of the flow runs that processes of the worker, even of a killed one, execute now."""
    ids = set()
    for process in find_marked(root, "worker"):
        try:
            ids.add(process.environ().get("PREFECT__FLOW_RUN_ID", ""))
        except (psutil.NoSuchProcess, psutil.AccessDenied):
            continue
    return ids
