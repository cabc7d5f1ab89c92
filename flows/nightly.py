"""Decides, before any stage, whether a start of the flow has to do anything tonight.

A run is a night's if its deployment's schedule starts it, or if the parameter `nightly` says so. It
trains only on something new, and once a night: a second start of the same night ends at once, a
failed one is resumed. After the machine was off, Prefect starts the missed nights one after the
other; all of them count as the newest one that is due, so that they are caught up once.
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

from flows.naming import show_verdict
from qwen3ft import logs
from qwen3ft.config import TrainingConfig
from qwen3ft.errors import FinetuneError, TransientError
from qwen3ft.jobs.folders import RunDir
from qwen3ft.operations.night import (
    Night,
    NightRequest,
    claim_night,
    date_of_run,
    describe_request,
    is_answered_by,
    kept_before,
)
from qwen3ft.operations.run_state import ending_of, is_running
from qwen3ft.records.run_card import ALREADY_DONE
from qwen3ft.registry.registry import Registry
from qwen3ft.registry.task_name import with_task_name
from qwen3ft.text.names import flaw_of_name
from qwen3ft.tracking.uri import database_path, default_tracking_uri

logger = logs.get_logger("night")

REGISTRY_SECONDS = 10.0
"""Longest wait for the champion's tags; without them the run proceeds as usual."""

SCHEDULED_TAG = "auto-scheduled"
"""Tag that Prefect's scheduler gives its runs."""


def is_nightly(*, asked: bool) -> bool:
    """Return True if the run is a night's: by its parameter, or started by the scheduler."""
    return asked or SCHEDULED_TAG in flow_run.tags


def for_night(config: TrainingConfig, *, nightly: bool) -> TrainingConfig:
    """Return the run's settings; a night never trains again on the champion's data."""
    return config.model_copy(update={"when_unchanged": "skip"}) if nightly else config


def named_for_task(config: TrainingConfig) -> TrainingConfig:
    """Return the settings with the name of the task's registered model, if an older one goes on."""
    uri = default_tracking_uri()
    if (database := database_path(uri)) is not None and not database.exists():
        return config  # the first run; making the tables takes longer than this may
    try:
        registry = Registry(uri, deadline_seconds=REGISTRY_SECONDS)
        return with_task_name(config, registry)
    except TransientError as error:
        logger.warning("cannot tell whether the task has an older name: %s", error.what)
        return config


def find_request(config: TrainingConfig) -> NightRequest | None:
    """Return the digests of the request, or None if unavailable; a stage then reports why."""
    try:
        return describe_request(config)
    except FinetuneError as error:
        logger.warning("cannot tell whether anything is new: %s", error.what)
        return None


@contextmanager
def claim_tonight(
    config: TrainingConfig, request: NightRequest | None, nightly: bool, continue_run: str | None
) -> Iterator[Night]:
    """Claim the night; a run that is not a night's always gets its claim.

    A run that has its verdict is not resumed, so its record stays as it is.
    """
    run_id = continue_run or str(flow_run.id)
    if continue_run and (ending := ending_of(RunDir(Path(config.runs_dir) / continue_run))):
        yield Night(run_id, f"run {run_id} is already completed: {ending}")
        return
    if not nightly or request is None:
        yield Night(run_id)
        return
    began = date_of_run(Path(config.runs_dir), continue_run) if continue_run else None
    date = began or night_date()
    with claim_night(Path(config.runs_dir), date, request, run_id) as night:
        if night.again:
            logger.info("the night of %s was left unfinished by run %s", date, night.run_id)
        yield night


def night_date() -> str:
    """Return the newest night that is due, as YYYY-MM-DD: this run's, or a later scheduled one.

    The date is in the schedule's time zone; UTC without a deployment or schedule.
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
    """Return the start time of the schedule's last run up to now."""
    wanted = FlowRunFilter(
        deployment_id=FlowRunFilterDeploymentId(any_=[deployment.id]),
        tags=FlowRunFilterTags(all_=[SCHEDULED_TAG]),
        expected_start_time=FlowRunFilterExpectedStartTime(before_=datetime.now(UTC)),
    )
    newest_first = FlowRunSort.EXPECTED_START_TIME_DESC
    runs = client.read_flow_runs(flow_run_filter=wanted, sort=newest_first, limit=1)
    return runs[0].expected_start_time if runs else None


def seen_before(config: TrainingConfig, request: NightRequest | None) -> str | None:
    """Name the version or run since which nothing is new, if that is reason not to train."""
    if request is None or (config.when_unchanged == "train" and config.new_data == "all"):
        return None
    registry = Registry(default_tracking_uri(), deadline_seconds=REGISTRY_SECONDS)
    try:
        champion = registry.champion(config.registered_name)
    except TransientError as error:
        logger.warning("cannot tell yet whether anything is new: %s", error.what)
        return None
    if champion is not None and _is_at_work(config, champion.tags.get("run")):
        return None  # this very run, resumed: it was killed between its promotion and its end
    version = champion.version if champion else None
    label = f"{champion.registered_model} v{version}" if champion else "the base model"
    if champion is not None and is_answered_by(champion.tags, request):
        return label
    lost = kept_before(Path(config.runs_dir), request, version)
    return f"run {lost.run_id}, which was no better than {label}" if lost else None


def _is_at_work(config: TrainingConfig, run_id: str | None) -> bool:
    if run_id is None or flaw_of_name(run_id):  # a tag of the registry
        return False
    return is_running(RunDir(Path(config.runs_dir).resolve() / run_id))


def end_as_taken(night: Night, model_name: str) -> State[Any]:
    """Return the final state of a second start of the same night."""
    show_verdict(ALREADY_DONE.lower(), model_name)
    return Completed(name=ALREADY_DONE, message=night.taken)
