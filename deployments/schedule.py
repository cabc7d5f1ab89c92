"""When the nightly run starts: cron and time zone in prefect.yaml, and whether it is switched on.

The file is the one truth about when; it is edited in place, so that its comments and everything
else stay. Whether the schedule is on is kept by the Prefect server.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import yaml

from deployments.api import send
from deployments.deploy import PREFECT_FILE, read_deployment
from deployments.stack import Stack
from qwen3ft.errors import ConfigError, EnvironmentNotReadyError
from qwen3ft.files import write_bytes_atomic
from qwen3ft.records.base import Record

SLUG = "nightly"

_LINES = {
    "cron": re.compile(r'^(\s*cron: )"[^"]*"', re.MULTILINE),
    "timezone": re.compile(r"^(\s*timezone: )\S+", re.MULTILINE),
}


class Schedule(Record):
    """When runs of the deployment start."""

    cron: str
    timezone: str


def read_schedule(root: Path) -> Schedule:
    """The schedule in the project's prefect.yaml.

    Raises:
        ConfigError: the file holds no schedule `nightly`.
    """
    return _parse((root / PREFECT_FILE).read_text(encoding="utf-8"))


def write_schedule(root: Path, cron: str, timezone: str) -> None:
    """Change cron and time zone in prefect.yaml, and nothing else.

    Args:
        root: The project folder.
        cron: Five fields, already checked.
        timezone: Of the IANA, already checked.

    Raises:
        ConfigError: the file is no longer written in a way that can be edited safely.
    """
    path = root / PREFECT_FILE
    before = path.read_text(encoding="utf-8")
    after = _LINES["cron"].sub(rf'\g<1>"{cron}"', before)
    after = _LINES["timezone"].sub(rf"\g<1>{timezone}", after)
    if _parse(after) != Schedule(cron=cron, timezone=timezone) or _rest(after) != _rest(before):
        raise ConfigError(
            f"The schedule in {PREFECT_FILE} cannot be changed by this command.",
            why="Its lines cron and timezone are written in another way than they were shipped.",
            next_command=f"${{EDITOR:-vi}} {PREFECT_FILE} && qwen3ft deploy",
        )
    write_bytes_atomic(path, after.encode())


def set_active(stack: Stack, *, active: bool) -> None:
    """Switch the registered schedule on or off.

    Raises:
        EnvironmentNotReadyError: it is not registered, or the server does not answer.
    """
    deployment = read_deployment(stack) or {}
    found = [item for item in deployment.get("schedules", ()) if item["slug"] == SLUG]
    if not found:
        raise EnvironmentNotReadyError(
            f"The schedule {SLUG!r} is not registered.",
            why="The deployment is missing, or was registered from another file.",
            next_command="qwen3ft deploy",
        )
    address = f"deployments/{deployment['id']}/schedules/{found[0]['id']}"
    send(stack.layout(), address, {"active": active}, "PATCH")


def _schedules(text: str) -> list[dict[str, Any]]:
    try:
        [deployment] = yaml.safe_load(text)["deployments"]
        return [item for item in deployment["schedules"] if item.get("slug") == SLUG]
    except (yaml.YAMLError, KeyError, TypeError, ValueError) as error:
        raise _no_schedule(str(error)) from error


def _parse(text: str) -> Schedule:
    try:
        [found] = _schedules(text)
        return Schedule(cron=found["cron"], timezone=found["timezone"])
    except (KeyError, ValueError) as error:
        raise _no_schedule(str(error)) from error


def _rest(text: str) -> Any:
    """All that the file says but when the schedule starts runs."""
    content = yaml.safe_load(text)
    for item in content["deployments"][0]["schedules"]:
        if item.get("slug") == SLUG:
            del item["cron"], item["timezone"]
    return content


def _no_schedule(reason: str) -> ConfigError:
    return ConfigError(
        f"{PREFECT_FILE} holds no schedule {SLUG!r}.",
        why=f"The file was changed ({reason}).",
        next_command=f"cat {PREFECT_FILE}",
    )
