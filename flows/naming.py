"""Name and tags of a flow run, by which Prefect's lists say what became of it.

A run starts as `Qwen3-4B 2026-11-26 02:00:03`. Once it has its verdict it is called
`promoted: Qwen3-4B 2026-11-26 02:00:03`, in MLflow too, and `promoted` and `Qwen3-4B` are among
its tags.
"""

from __future__ import annotations

from datetime import UTC, datetime
from typing import get_args

from prefect.client.orchestration import get_client
from prefect.runtime import flow_run

from flows.parameters import over_deployment
from qwen3ft import logs
from qwen3ft.records.run_card import ALREADY_DONE, DEGRADED, Outcome
from tasks.artifacts import NOT_SHOWN

logger = logs.get_logger("flow")

_VERDICTS = {*get_args(Outcome), DEGRADED.lower(), ALREADY_DONE.lower()}


def run_name() -> str:
    """Return the name at the start: the model and the time."""
    model_name = over_deployment(flow_run.parameters.get("config")).model_name
    return f"{_short(model_name)} {datetime.now(UTC):%Y-%m-%d %H:%M:%S}"


def name_with_verdict(verdict: str) -> str:
    """Return the name of this flow run once it has its verdict."""
    return f"{verdict}: {flow_run.name}"


def show_verdict(verdict: str, model_name: str) -> None:
    """Put the verdict and the model into the name and the tags of this flow run.

    Skipped if the server does not answer.
    """
    kept = [tag for tag in flow_run.tags if tag not in _VERDICTS]  # of an earlier start of it
    try:
        tags = dict.fromkeys([verdict, _short(model_name), *kept])
        with get_client(sync_client=True) as client:
            client.update_flow_run(flow_run.id, name=name_with_verdict(verdict), tags=list(tags))
    except NOT_SHOWN as error:
        logger.warning("Prefect's lists do not show the verdict: %s", error)


def _short(model_name: str) -> str:
    return model_name.rstrip("/").rpartition("/")[2]
