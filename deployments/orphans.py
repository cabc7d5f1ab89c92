"""Runs that the server takes for running although no process executes them any more.

Prefect's worker reports that a run's process ended; when worker and process end together (a power
cut, `down`, the kernel's OOM killer) nobody does. Such a run would stay Running, and keep the one
concurrency slot, so that no later run ever started. `up` and `down` end such runs here at once; the
automation that `deploy` adds does it while nobody is looking.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import psutil

from deployments import services
from deployments.processes import find_marked
from deployments.services import POOL, Layout

UNFINISHED = ("PENDING", "RUNNING", "CANCELLING")


def end_orphans(layout: Layout) -> int:
    """Mark as Crashed every unfinished run of the pool that no living process executes.

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
    state = {"type": "CRASHED", "name": "Crashed", "message": message}
    for run in orphans:
        services.request_text(f"{api}/flow_runs/{run['id']}/set_state", {"state": state})
    return len(orphans)


def _executing(root: Path) -> set[str]:
    """Ids of the flow runs that processes of the worker, even of a killed one, execute now."""
    ids = set()
    for process in find_marked(root, "worker"):
        try:
            ids.add(process.environ().get("PREFECT__FLOW_RUN_ID", ""))
        except (psutil.NoSuchProcess, psutil.AccessDenied):
            continue
    return ids
