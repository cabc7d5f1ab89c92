"""Runs that the server believes to be running although no process executes them any more.

Prefect's worker reports that a run's process ended. When both end together (a power cut, `down`,
the kernel's OOM killer) nobody does: the run would stay Running and keep the one concurrency slot,
so that no later run could start. `up` and `down` therefore end such runs, and start the run that
continues each.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import psutil

from deployments import services
from deployments.automations import PROCESS_LOST, resumption_parameters
from deployments.processes import find_marked
from deployments.services import DEPLOYMENT, POOL, Layout

_UNFINISHED = ("PENDING", "RUNNING", "CANCELLING")


def end_orphans(layout: Layout) -> int:
    """Mark as crashed, and continue, every unfinished run of the pool that no process executes.

    Call it only while no worker is up. Runs of other origin (`qwen3ft train`) have no pool.

    Returns:
        How many there were.
    """
    # The automations of `deploy` do both as well, but not reliably at this moment: a server that
    # has just started holds back an event for 15 minutes if it follows one from before the start,
    # and a server that is about to end may not get to it.
    alive = _executing(layout.root)
    api = f"{layout.url('prefect')}/api"
    wanted = {
        "work_pools": {"name": {"any_": [POOL]}},
        "flow_runs": {"state": {"type": {"any_": _UNFINISHED}}},
    }
    orphans: list[dict[str, Any]] = [
        run
        for run in services.request_json(f"{api}/flow_runs/filter", wanted) or ()
        if run["id"] not in alive
    ]
    message = "Its process and the worker ended together. Its checkpoints are kept."
    for run in orphans:
        # continue first: if this is killed between the two, the next `up` repeats both
        name = PROCESS_LOST if _continue(api, run) else "Crashed"
        state = {"type": "CRASHED", "name": name, "message": message}
        services.request_text(f"{api}/flow_runs/{run['id']}/set_state", {"state": state})
    return len(orphans)


def _continue(api: str, run: Mapping[str, Any]) -> bool:
    """Start a run that continues `run`, as the automation does after a crash."""
    deployment = services.request_json(f"{api}/deployments/name/{DEPLOYMENT}")
    if deployment is None or run["deployment_id"] != deployment["id"]:
        return False
    address = f"{api}/deployments/{deployment['id']}/create_flow_run"
    return services.request_json(address, {"parameters": resumption_parameters(run)}) is not None


def _executing(root: Path) -> set[str]:
    """Return the ids of the flow runs that processes of a worker, even a killed one, execute."""
    ids = set()
    for process in find_marked(root, "worker"):
        try:
            ids.add(process.environ().get("PREFECT__FLOW_RUN_ID", ""))
        except (psutil.NoSuchProcess, psutil.AccessDenied):
            continue
    return ids
