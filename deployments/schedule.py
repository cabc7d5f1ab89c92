"""Schedule of the nightly run: cron and time zone in prefect.yaml, on or off on the server.

The file is the single source of the times. It is edited in place, so that its comments and
everything else stay.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import yaml

from deployments.deploy import PREFECT_FILE, read_deployment
from deployments.prefect_api import send
from deployments.stack import Stack
from qwen3ft.errors import ConfigError, EnvironmentNotReadyError
from qwen3ft.files import write_bytes_atomic
from qwen3ft.records.base import Record

_SLUG = "nightly"

_LINES = {
    "cron": re.compile(r'^(\s*cron: )"[^"]*"', re.MULTILINE),
    "timezone": re.compile(r"^(\s*timezone: )\S+", re.MULTILINE),
}


class Schedule(Record):
    """Times at which runs of the deployment start."""

    cron: str
    timezone: str


def read_schedule(root: Path) -> Schedule:
    """Read the schedule in the project's prefect.yaml.

    Raises:
        ConfigError: the file has no schedule `nightly`.
    """
    return _parse((root / PREFECT_FILE).read_text(encoding="utf-8"))


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


def write_schedule(root: Path, cron: str, timezone: str) -> None:
    """Change cron and time zone in prefect.yaml, and nothing else.

    Args:
        root: The project folder.
        cron: Five fields, already checked.
        timezone: IANA name, already checked.

    Raises:
        ConfigError: the file is not laid out in the way that can be edited safely.
    """
    path = root / PREFECT_FILE
    before = path.read_text(encoding="utf-8")
    after = _LINES["cron"].sub(rf'\g<1>"{cron}"', before)
    after = _LINES["timezone"].sub(rf"\g<1>{timezone}", after)
    if _parse(after) != Schedule(cron=cron, timezone=timezone) or _rest(after) != _rest(before):
        raise ConfigError(
            f"The schedule in {PREFECT_FILE} cannot be changed by this command.",
            why="Its cron and timezone lines are not laid out as they were shipped.",
            next_command=f"${{EDITOR:-vi}} {PREFECT_FILE} && qwen3ft deploy",
        )
    write_bytes_atomic(path, after.encode())


def set_active(stack: Stack, *, active: bool) -> None:
    """Switch the registered schedule on or off.

    Raises:
        EnvironmentNotReadyError: it is not registered, or the server does not answer.
    """
    deployment = read_deployment(stack) or {}
    found = [item for item in deployment.get("schedules", ()) if item["slug"] == _SLUG]
    if not found:
        raise EnvironmentNotReadyError(
            f"The schedule {_SLUG!r} is not registered.",
            why="The deployment is missing, or was registered from a different file.",
            next_command="qwen3ft deploy",
        )
    address = f"deployments/{deployment['id']}/schedules/{found[0]['id']}"
    send(stack.layout(), address, {"active": active}, "PATCH")


def _schedules(text: str) -> list[dict[str, Any]]:
    try:
        [deployment] = yaml.safe_load(text)["deployments"]
        return [item for item in deployment["schedules"] if item.get("slug") == _SLUG]
    except (yaml.YAMLError, KeyError, TypeError, ValueError) as error:
        raise _no_schedule(str(error)) from error


def _parse(text: str) -> Schedule:
    try:
        [found] = _schedules(text)
        return Schedule(cron=found["cron"], timezone=found["timezone"])
    except (KeyError, ValueError) as error:
        raise _no_schedule(str(error)) from error


def _rest(text: str) -> Any:
    """Return the content of the file without the times of the schedule."""
    content = yaml.safe_load(text)
    for item in content["deployments"][0]["schedules"]:
        if item.get("slug") == _SLUG:
            del item["cron"], item["timezone"]
    return content


def _no_schedule(reason: str) -> ConfigError:
    return ConfigError(
        f"{PREFECT_FILE} has no schedule {_SLUG!r}.",
        why=f"The file was changed ({reason}).",
        next_command=f"cat {PREFECT_FILE}",
    )
