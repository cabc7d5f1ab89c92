"""Where a start of the flow stands in the order of nights: asked before any stage.

A run is a night's if its deployment's schedule starts it, or if the parameter `nightly` says so. It
trains only on something new, and once a night: a second start of the same night ends at once, a
failed one is taken up. Nights that were missed while the machine was off are started one after the
other by Prefect once it is on; all of them count as the newest one that is due, so that they are
caught up once. Nothing here loads torch or starts a process.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Any
from zoneinfo import ZoneInfo

from prefect.client.orchestration import SyncPrefectClient, get_client
from prefect.client.schemas.filters import (
    FlowRunFilter,
    FlowRunFilterDeploymentId,
    FlowRunFilterExpectedStartTime,
    FlowRunFilterTags,
)
from prefect.client.schemas.objects import State
from prefect.client.schemas.sorting import FlowRunSort
from prefect.runtime import deployment, flow_run
from prefect.states import Completed

from qwen3ft import logs
from qwen3ft.config import TrainingConfig
from qwen3ft.errors import FinetuneError, TransientError
from qwen3ft.jobs.folders import RunDir
from qwen3ft.operations.night import (
    ALREADY_DONE,
    Night,
    NightRequest,
    claim_night,
    date_of_run,
    describe_request,
    is_answered_by,
    kept_before,
)
from qwen3ft.operations.run_state import find_runs, is_running
from qwen3ft.registry.registry import Registry
from qwen3ft.tracking.uri import default_tracking_uri

logger = logs.get_logger("night")

REGISTRY_SECONDS = 10.0
"""How long the champion's tags are waited for; without them the run goes its ordinary way."""

SCHEDULED_TAG = "auto-scheduled"
"""What Prefect's scheduler tags its runs with."""


def is_nightly(*, asked: bool) -> bool:
    """Whether the run is a night's; Prefect tags what its scheduler starts."""
    return asked or SCHEDULED_TAG in flow_run.tags


def for_night(config: TrainingConfig, *, nightly: bool) -> TrainingConfig:
    """The settings of a run; at night it is not trained on what the champion was trained on."""
    return config.model_copy(update={"when_unchanged": "skip"}) if nightly else config


def find_request(config: TrainingConfig) -> NightRequest | None:
    """What is asked for, or None where that cannot be told: the stages then say why."""
    try:
        return describe_request(config)
    except FinetuneError as error:
        logger.warning("whether anything is new cannot be told: %s", error.what)
        return None


@contextmanager
def claim_tonight(
    config: TrainingConfig, request: NightRequest | None, nightly: bool, continue_run: str | None
) -> Iterator[Night]:
    """The night's claim; a run that is not a night's has one of its own.

    A crashed run is taken up once, though a busy server may start it more often.
    """
    run_id = continue_run or str(flow_run.id)
    if continue_run and flow_run.parameters.get("resumed") and _has_ended(config, continue_run):
        yield Night(run_id, f"already done by run {run_id}")
        return
    if not nightly or request is None:
        yield Night(run_id)
        return
    began = date_of_run(Path(config.runs_dir), continue_run) if continue_run else None
    date = began or night_date()
    with claim_night(Path(config.runs_dir), date, request, run_id) as night:
        if night.again:
            logger.info("the night of %s was left undone by run %s", date, night.run_id)
        yield night


def _has_ended(config: TrainingConfig, run_id: str) -> bool:
    """Whether the run has its verdict."""
    runs = find_runs(Path(config.runs_dir).resolve())
    return any(run.run.path.name == run_id and run.state == "completed" for run in runs)


def night_date() -> str:
    """YYYY-MM-DD of the newest night that is due: this run's own, or a later one of its schedule.

    In the schedule's time zone; UTC for a run without a deployment, or one without a schedule.
    """
    own = flow_run.scheduled_start_time or datetime.now(UTC)
    if deployment.id is None:
        return f"{own.astimezone(UTC):%Y-%m-%d}"
    with get_client(sync_client=True) as client:
        schedules = client.read_deployment(deployment.id).schedules
        newest = max(own, _newest_due(client) or own)
    zones = [getattr(item.schedule, "timezone", None) for item in schedules]
    return f"{newest.astimezone(ZoneInfo(next(filter(None, zones), 'UTC'))):%Y-%m-%d}"


def _newest_due(client: SyncPrefectClient) -> datetime | None:
    """When the schedule's last run up to now was to start."""
    wanted = FlowRunFilter(
        deployment_id=FlowRunFilterDeploymentId(any_=[deployment.id]),
        tags=FlowRunFilterTags(all_=[SCHEDULED_TAG]),
        expected_start_time=FlowRunFilterExpectedStartTime(before_=datetime.now(UTC)),
    )
    newest_first = FlowRunSort.EXPECTED_START_TIME_DESC
    runs = client.read_flow_runs(flow_run_filter=wanted, sort=newest_first, limit=1)
    return runs[0].expected_start_time if runs else None


def seen_before(config: TrainingConfig, request: NightRequest | None) -> str | None:
    """Since when there is nothing new, if the settings say that this is reason not to train."""
    if request is None or (config.when_unchanged == "train" and config.new_data == "all"):
        return None
    registry = Registry(default_tracking_uri(), deadline_seconds=REGISTRY_SECONDS)
    try:
        champion = registry.champion(config.registered_name)
    except TransientError as error:
        logger.warning("whether anything is new is not known yet: %s", error.what)
        return None
    if champion is not None and _is_at_work(config, champion.tags.get("run")):
        return None  # this very run, taken up: it was killed after its promotion, before its end
    version = champion.version if champion else None
    label = f"{champion.registered_model} v{version}" if champion else "the base model"
    if champion is not None and is_answered_by(champion.tags, request):
        return label
    lost = kept_before(Path(config.runs_dir), request, version)
    return f"run {lost.run_id}, which was no better than {label}" if lost else None


def _is_at_work(config: TrainingConfig, run_id: str | None) -> bool:
    return bool(run_id) and is_running(RunDir(Path(config.runs_dir).resolve() / str(run_id)))


def end_as_taken(night: Night) -> State[Any]:
    """The end of a second start of the same night."""
    return Completed(name=ALREADY_DONE, message=night.taken)
