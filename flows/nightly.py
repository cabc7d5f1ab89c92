"""Where a start of the flow stands in the order of nights: asked before any stage.

A schedule gives its time zone as the flow's parameter `nightly`. Such a run trains only on
something new, and once a night: a second start of the same night ends at once, a failed one is
taken up. Nights that were missed while the machine was off are started one after the other by
Prefect once it is on; all of them count as the newest one that is due, so that they are caught up
once. Nothing here loads torch or starts a process.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Any
from zoneinfo import ZoneInfo, ZoneInfoNotFoundError

from prefect.client.orchestration import get_client
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
from qwen3ft.errors import ConfigError, FinetuneError, TransientError
from qwen3ft.night import (
    ALREADY_DONE,
    Night,
    Request,
    answers,
    claim_night,
    describe_request,
    kept_before,
)
from qwen3ft.registry import Registry
from qwen3ft.tracking_uri import default_tracking_uri
from tasks.promote import registered_name

logger = logs.get_logger("night")

MOST_RESUMES = 1
"""How often a crashed run is taken up without a person; see `deployments.automations`."""

REGISTRY_SECONDS = 10.0
"""How long the champion's tags are waited for; without them the run goes its ordinary way."""

SCHEDULED_TAG = "auto-scheduled"
"""What Prefect's scheduler tags its runs with."""


def check_resumes(continue_run: str | None, resumed: int) -> None:
    """Refuse to take up a crashed run again and again.

    Raises:
        FinetuneError: it crashed once more after it had been taken up.
    """
    if resumed > MOST_RESUMES:
        raise FinetuneError(
            f"Run {continue_run} crashed again after it was taken up {resumed - 1} time(s).",
            why="What ends its process is no accident; see the end of its log in run.jsonl.",
            next_command=f"qwen3ft run --resume {continue_run}",
        )


def for_night(config: TrainingConfig, nightly: str | None) -> TrainingConfig:
    """The settings of a run; at night it is not trained on what the champion was trained on."""
    return config.model_copy(update={"when_unchanged": "skip"}) if nightly else config


def find_request(config: TrainingConfig) -> Request | None:
    """What is asked for, or None where that cannot be told: the stages then say why."""
    try:
        return describe_request(config)
    except FinetuneError as error:
        logger.warning("whether anything is new cannot be told: %s", error.what)
        return None


@contextmanager
def tonight(
    config: TrainingConfig, request: Request | None, nightly: str | None, continue_run: str | None
) -> Iterator[Night]:
    """The night's claim; a run that is not a night's has one of its own.

    Raises:
        ConfigError: there is no such time zone.
    """
    run_id = continue_run or str(flow_run.id)
    if nightly is None or request is None:
        yield Night(run_id)
        return
    date = night_date(nightly)
    with claim_night(Path(config.runs_dir), date, request, run_id) as night:
        if night.again:
            logger.info("the night of %s was left undone by run %s", date, night.run_id)
        yield night


def night_date(zone: str) -> str:
    """YYYY-MM-DD of the newest night that is due, this run's own or a later one of its schedule.

    Raises:
        ConfigError: there is no such time zone.
    """
    try:
        timezone = ZoneInfo(zone)
    except (ZoneInfoNotFoundError, ValueError, OSError):
        raise ConfigError(
            f"{zone!r} is no time zone.",
            why="The parameter 'nightly' is the schedule's time zone, as the IANA names it.",
            next_command="qwen3ft schedule --timezone Europe/Berlin",
        ) from None
    own = flow_run.scheduled_start_time or datetime.now(UTC)
    return f"{max(own, _newest_due() or own).astimezone(timezone):%Y-%m-%d}"


def _newest_due() -> datetime | None:
    """When the schedule's last run up to now was to start."""
    if deployment.id is None:
        return None
    wanted = FlowRunFilter(
        deployment_id=FlowRunFilterDeploymentId(any_=[deployment.id]),
        tags=FlowRunFilterTags(all_=[SCHEDULED_TAG]),
        expected_start_time=FlowRunFilterExpectedStartTime(before_=datetime.now(UTC)),
    )
    newest_first = FlowRunSort.EXPECTED_START_TIME_DESC
    with get_client(sync_client=True) as client:
        runs = client.read_flow_runs(flow_run_filter=wanted, sort=newest_first, limit=1)
    return runs[0].expected_start_time if runs else None


def seen_before(config: TrainingConfig, request: Request | None) -> str | None:
    """Since when there is nothing new, if the settings say that this is reason not to train."""
    if request is None or (config.when_unchanged == "train" and config.new_data == "all"):
        return None
    registry = Registry(default_tracking_uri(), deadline_seconds=REGISTRY_SECONDS)
    try:
        champion = registry.champion(registered_name(config))
    except TransientError as error:
        logger.warning("whether anything is new is not known yet: %s", error.what)
        return None
    if champion is None:
        return None
    label = f"{champion.registered_model} v{champion.version}"
    if answers(champion.tags, request):
        return label
    lost = kept_before(Path(config.runs_dir), request, champion.version)
    return f"run {lost.run_id}, which was no better than {label}" if lost else None


def end_as_taken(night: Night) -> State[Any]:
    """The end of a second start of the same night."""
    return Completed(name=ALREADY_DONE, message=night.taken)
