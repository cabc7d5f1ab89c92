"""Resumes a run with its own settings, and a crashed one once and in one flow run only."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import httpx
from prefect.client.orchestration import SyncPrefectClient, get_client
from prefect.client.schemas.filters import (
    FlowRunFilter,
    FlowRunFilterDeploymentId,
    FlowRunFilterState,
    FlowRunFilterStateType,
)
from prefect.client.schemas.objects import FlowRun, State, StateType
from prefect.exceptions import PrefectException
from prefect.runtime import deployment, flow_run
from prefect.states import Completed

from flows.parameters import deployment_settings, over_deployment
from qwen3ft import logs
from qwen3ft.config import TrainingConfig, parse_config
from qwen3ft.errors import FinetuneError
from qwen3ft.jobs.folders import RunDir
from qwen3ft.operations.resumption import find_begun_run, resumed_settings, unfinished_settings
from qwen3ft.records.run_card import ALREADY_DONE

logger = logs.get_logger("flow")

_NOT = object()

MOST_RESUMES = 1
"""Automatic resumes of a crashed run; see `deployments.automations`."""


def refuse_second_resume(config: TrainingConfig, continue_run: str | None, resumed: int) -> None:
    """Refuse to resume a crashed run again and again.

    Raises:
        FinetuneError: it crashed again after it had been resumed.
    """
    if resumed > MOST_RESUMES:
        raise FinetuneError(
            f"Run {continue_run} crashed again after it was resumed {resumed - 1} time(s).",
            why="Something ends its process every time; see the end of its log, run.jsonl.",
            next_command=RunDir(Path(config.runs_dir).resolve() / str(continue_run)).resume_command,
        )


def settings_to_resume(config: TrainingConfig, continue_run: str) -> TrainingConfig:
    """Return the settings with which a run goes on: its own, with what `config` may change of them.

    Raises:
        ConfigError: there is no such run, or `config` was given a setting that may not change.
    """
    run = find_begun_run(over_deployment(config).runs_dir, continue_run)
    given = config.model_dump(mode="json", include=config.model_fields_set)
    return resumed_settings(run, asked_for(given, deployment_settings(deployment.id)))


def settings_to_finish(config: TrainingConfig, run_id: str) -> TrainingConfig:
    """Return the settings with which tonight's run finishes an earlier one, if that has begun."""
    run = RunDir(Path(config.runs_dir).resolve() / run_id)
    if not run.config.is_file():
        return config
    settings, ignored = unfinished_settings(run, config)
    if ignored:
        logger.warning("run %s goes on with its own %s", run_id, ", ".join(ignored))
    return settings


def asked_for(given: Mapping[str, Any], filled: Mapping[str, Any]) -> dict[str, Any]:
    """Return the settings that were asked for, without those that only fill a form.

    Args:
        given: Settings that a run was started with.
        filled: The deployment's. A run that is started without settings, or from the form on the
            deployment's page, has all of them: those count as not given.
    """
    if not filled.keys() <= given.keys():
        return dict(given)
    default = parse_config(filled).model_dump(mode="json", include=set(filled))
    return {name: value for name, value in given.items() if default.get(name, _NOT) != value}


def cancel_duplicate_resumes(continue_run: str | None, resumed: int) -> None:
    """End the other flow runs that are to resume the same crash, before they start a process.

    If the server does not answer, each of them finds out by itself.
    """
    # A server whose SQLite database is locked evaluates a crash up to four times, and asks for a
    # run each time.
    if not resumed or deployment.id is None:
        return
    try:
        with get_client(sync_client=True) as client:
            for twin in _duplicate_resumes(client, continue_run, resumed):
                state: State[Any] = Completed(name=ALREADY_DONE, message=f"see run {flow_run.id}")
                client.set_flow_run_state(twin.id, state, force=True)
    except (httpx.HTTPError, PrefectException, OSError) as error:
        logger.warning("cannot look for other flow runs that resume %s: %s", continue_run, error)


def _duplicate_resumes(
    client: SyncPrefectClient, continue_run: str | None, resumed: int
) -> list[FlowRun]:
    """Return waiting runs of this deployment that are to resume the same crash."""
    waiting = FlowRunFilterStateType(any_=[StateType.SCHEDULED])
    wanted = FlowRunFilter(
        deployment_id=FlowRunFilterDeploymentId(any_=[deployment.id]),
        state=FlowRunFilterState(type=waiting),
    )
    same = {"continue_run": continue_run, "resumed": resumed}
    found = client.read_flow_runs(flow_run_filter=wanted)
    return [run for run in found if same.items() <= run.parameters.items()]
