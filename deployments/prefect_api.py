"""Requests to the stack's Prefect server that must succeed, and its record of past runs.

The server removes old runs by itself after `services.HISTORY_DAYS`; `remove_old` does it at once,
for any number of days. What came of the runs stays in MLflow.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from datetime import UTC, datetime, timedelta
from typing import Any

from deployments import services
from deployments.services import Layout
from qwen3ft.errors import EnvironmentNotReadyError
from qwen3ft.text.commands import shell_line

_PAGE = 200
_ENDED = ("COMPLETED", "FAILED", "CRASHED", "CANCELLED")


def send(
    layout: Layout, address: str, body: Mapping[str, Any] | None = None, method: str = "POST"
) -> Any:
    """Send a request and return the parsed answer; None for an empty one.

    Args:
        layout: Where the server is.
        address: The part of its address after /api/.
        body: Sent as JSON.
        method: HTTP method.

    Raises:
        EnvironmentNotReadyError: the server does not answer, or refuses.
    """
    text = services.request_text(
        layout.secret, f"{layout.url('prefect')}/api/{address}", body, method
    )
    if text is None:
        log = layout.log("prefect")
        raise EnvironmentNotReadyError(
            f"The Prefect server refused {method} /api/{address} or does not answer.",
            why="It may have been stopped in the meantime, or be another version.",
            next_command=shell_line("tail", "-n", "50", log) if log.exists() else "qwen3ft status",
        )
    return json.loads(text) if text else None


def read_deployment(layout: Layout, name: str = services.DEPLOYMENT) -> dict[str, Any] | None:
    """Return a deployment, by default that of runs, as the server knows it; None if it knows none.

    Raises:
        EnvironmentNotReadyError: the server does not answer.
    """
    found = send(layout, "deployments/filter", services.only_deployment(name))
    return found[0] if found else None


def count_old(layout: Layout, keep_days: float) -> int:
    """Count the flow runs that ended more than this many days ago.

    Raises:
        EnvironmentNotReadyError: the server does not answer.
    """
    return int(send(layout, "flow_runs/count", {"flow_runs": _ended_before(keep_days)}))


def remove_old(layout: Layout, keep_days: float) -> int:
    """Delete those flow runs, with their task runs and logs; return how many there were.

    Raises:
        EnvironmentNotReadyError: the server does not answer.
    """
    body = {"flow_runs": _ended_before(keep_days), "limit": _PAGE}
    removed = 0
    while found := send(layout, "flow_runs/filter", body):
        for run in found:
            send(layout, f"flow_runs/{run['id']}", method="DELETE")
        removed += len(found)
    return removed


def _ended_before(keep_days: float) -> dict[str, Any]:
    before = (datetime.now(UTC) - timedelta(days=keep_days)).isoformat()
    return {"state": {"type": {"any_": _ENDED}}, "end_time": {"before_": before}}
