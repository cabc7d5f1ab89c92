"""The commands about this machine: doctor, up, down, status, deploy, schedule."""

from __future__ import annotations

import typer

from deployments.deploy import deploy as register
from deployments.schedule import read_schedule, set_active, write_schedule
from deployments.supervise import stay_up
from deployments.unit import write_unit
from flows.cli_project import open_project
from flows.cli_view import open_console, print_json, say, show_report, show_status
from qwen3ft.errors import ConfigError, EnvironmentNotReadyError
from qwen3ft.machine.environment import EnvironmentManager


def up(*, stay: bool, unit: bool) -> None:
    """Start what is down, then say what is up; or keep it up, or only write the systemd unit."""
    stack = open_project()
    if unit:
        path = write_unit(stack.root)
        say(f"Written: {path}")
        say("Start it now and with the machine, also before you log in:")
        say(f"  systemctl --user enable --now {path.name} && loginctl enable-linger")
    elif stay:
        stay_up(stack, say)
    else:
        show_status(open_console(), stack.up(say))


def down() -> None:
    """Stop everything, and say what was stopped."""
    if not open_project().down(say):
        say("Nothing was running.")


def status(*, as_json: bool) -> None:
    """Say what is up."""
    found = open_project().status()
    if as_json:
        print_json(found.model_dump(mode="json"))
    else:
        show_status(open_console(), found)


def deploy() -> None:
    """Register the deployment, whether or not it changed."""
    stack = open_project()
    stack.up(say)
    register(stack, say, force=True)


def schedule(cron: str | None, timezone: str | None, *, active: bool | None) -> None:
    """Show when the nightly run starts; change it first, if asked to.

    Raises:
        ConfigError: the cron line or the time zone is none.
    """
    stack = open_project()
    found = read_schedule(stack.root)
    wanted = (cron or found.cron, timezone or found.timezone)
    if wanted != (found.cron, found.timezone):
        _check_schedule(*wanted)
        write_schedule(stack.root, *wanted)
    if cron or timezone or active is not None:
        stack.up(say)
        register(stack, say)  # at once if it is registered, as it is not if this failed last time
    if active is not None:
        set_active(stack, active=active)
    now = stack.status()
    state = "on" if now.schedule_active else "off"
    if now.prefect_url is None:
        state = "not known, the server is down; to see it: qwen3ft up"
    cron, timezone = wanted
    open_console().print(f'nightly  cron "{cron}", time zone {timezone}: {state}')


def _check_schedule(cron: str, timezone: str) -> None:
    from prefect.client.schemas.schedules import CronSchedule
    from pydantic import ValidationError

    try:
        CronSchedule(cron=cron, timezone=timezone)
    except ValidationError as error:
        raise ConfigError(
            f'cron "{cron}" in time zone {timezone} is no schedule.',
            why="; ".join(issue["msg"] for issue in error.errors(include_url=False)),
            next_command='qwen3ft schedule --cron "0 2 * * *" --timezone Europe/Berlin',
        ) from None


def doctor(*, as_json: bool) -> None:
    """Say what this machine is and what it lacks; exit code 1 if it lacks something.

    Raises:
        EnvironmentNotReadyError: the NVIDIA driver does not answer.
    """
    stack = open_project()
    manager = EnvironmentManager(stack.root)
    problems = _problems(manager)
    report, found = manager.report(), stack.status()
    if as_json:
        print_json(
            {
                "ready": not problems,
                "problems": problems,
                "environment": report.model_dump(mode="json"),
                "stack": found.model_dump(mode="json"),
            }
        )
    else:
        show_report(open_console(), report, problems)
        show_status(open_console(), found)
    if problems:
        raise typer.Exit(1)


def _problems(manager: EnvironmentManager) -> list[str]:
    try:
        manager.validate_environment()
    except EnvironmentNotReadyError as error:
        return list(error.facts.get("problems", [error.what]))
    return []
