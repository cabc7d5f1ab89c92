"""The Prefect server's record of runs that ended long ago, and its removal.

The server removes them by itself after `services.HISTORY_DAYS`; here it is done at once, and for
another number of days. MLflow keeps what came of the runs.
"""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from typing import Any

from deployments.api import send
from deployments.services import Layout

PAGE = 200
_ENDED = ("COMPLETED", "FAILED", "CRASHED", "CANCELLED")


def count_old(layout: Layout, keep_days: float) -> int:
    """How many flow runs ended more than so many days ago.

    Raises:
        EnvironmentNotReadyError: the server does not answer.
    """
    return int(send(layout, "flow_runs/count", {"flow_runs": _wanted(keep_days)}))


def remove_old(layout: Layout, keep_days: float) -> int:
    """Delete those flow runs, with their task runs and logs.

    Returns:
        How many there were.

    Raises:
        EnvironmentNotReadyError: the server does not answer.
    """
    body = {"flow_runs": _wanted(keep_days), "limit": PAGE}
    removed = 0
    while found := send(layout, "flow_runs/filter", body):
        for run in found:
            send(layout, f"flow_runs/{run['id']}", method="DELETE")
        removed += len(found)
    return removed


def _wanted(keep_days: float) -> dict[str, Any]:
    before = (datetime.now(UTC) - timedelta(days=keep_days)).isoformat()
    return {"state": {"type": {"any_": _ENDED}}, "end_time": {"before_": before}}
