"""Schedule of the nightly run: cron, time zone, and on or off, all of it on the server.

prefect.yaml only says what the schedule is at first. Registering the deployment again leaves it as
it is on the server (see `deployments.deploy`), so no tracked file has to be edited.
"""

from __future__ import annotations

from typing import Any

from deployments.deploy import NIGHTLY
from deployments.prefect_api import read_deployment, send
from deployments.stack import Stack
from qwen3ft.errors import ConfigError, EnvironmentNotReadyError
from qwen3ft.records.base import Record


class Schedule(Record):
    """Times at which runs of the deployment start, and whether they do."""

    cron: str | None
    """None for an interval or an RRule, which the deployment's page can make of it."""
    timezone: str
    active: bool


def read_schedule(stack: Stack) -> Schedule:
    """Read the schedule from the server.

    Raises:
        EnvironmentNotReadyError: it is not registered, or the server does not answer.
    """
    _, found = _registered(stack)
    times = found["schedule"]
    zone = times.get("timezone") or "UTC"
    return Schedule(cron=times.get("cron"), timezone=zone, active=found["active"])


def check_schedule(cron: str, timezone: str) -> None:
    """Raise unless Prefect accepts a cron line and a time zone.

    Raises:
        ConfigError: it does not.
    """
    from prefect.client.schemas.schedules import CronSchedule
    from pydantic import ValidationError

    try:
        CronSchedule(cron=cron, timezone=timezone)
    except ValidationError as error:
        raise ConfigError(
            f'cron "{cron}" in time zone {timezone} is not a valid schedule.',
            why="; ".join(issue["msg"] for issue in error.errors(include_url=False)),
            next_command='qwen3ft schedule --cron "0 2 * * *" --timezone Europe/Berlin',
        ) from None


def change_schedule(stack: Stack, **changes: Any) -> Schedule:
    """Change cron, timezone or active on the server, and return what it has then.

    A cron line replaces an interval or an RRule.

    Raises:
        EnvironmentNotReadyError: it is not registered, or the server does not answer.
    """
    deployment_id, found = _registered(stack)
    times = {name: changes[name] for name in ("cron", "timezone") if name in changes}
    if "cron" in times and "cron" not in found["schedule"]:
        times = {"timezone": found["schedule"].get("timezone"), **times}
    else:
        times = found["schedule"] | times
    send(
        stack.layout(),
        f"deployments/{deployment_id}/schedules/{found['id']}",
        {"active": changes.get("active", found["active"]), "schedule": times},
        "PATCH",
    )
    return read_schedule(stack)


def _registered(stack: Stack) -> tuple[str, dict[str, Any]]:
    """Return the id of the deployment, and its schedule as the server has it."""
    deployment = read_deployment(stack.layout()) or {}
    for item in deployment.get("schedules", ()):
        if item["slug"] == NIGHTLY:
            return str(deployment["id"]), item
    raise EnvironmentNotReadyError(
        f"The schedule {NIGHTLY!r} is not registered.",
        why="The server's deployment is missing, or was registered from a different file.",
        next_command="qwen3ft deploy",
    )
