"""The commands about this machine and its servers: up, down, status, deploy, schedule, doctor."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from flows.cli.options import JsonOption
from flows.cli.output import open_console, print_json, say
from qwen3ft.text.commands import runnable

if TYPE_CHECKING:
    from qwen3ft.machine.environment import EnvironmentManager


def up_command(
    stay: Annotated[
        bool,
        typer.Option("--stay", help="Restart whatever ends, until Ctrl-C or qwen3ft down."),
    ] = False,
    write_unit: Annotated[
        bool, typer.Option("--write-unit", help="Only write a systemd user unit for this.")
    ] = False,
) -> None:
    """Start the local servers (Prefect, MLflow, one worker) that are not up yet."""
    from deployments import autostart
    from flows.cli.project import open_project
    from flows.cli.views.common import show_status

    stack = open_project()
    if write_unit:
        path = autostart.write_unit(stack.root)
        say(f"Written: {path}")
        say("To start it now and with the machine, before anybody logs in:")
        say(f"  systemctl --user enable --now {path.name} && loginctl enable-linger")
    elif stay:
        autostart.stay_up(stack, say)
    else:
        show_status(open_console(), stack.up(say), stack.layout().sign_in_link)


def down_command() -> None:
    """Stop the local servers and whatever runs on them."""
    from flows.cli.project import open_project

    if not open_project().down(say):
        say("Nothing was running.")


def status_command(as_json: JsonOption = False) -> None:
    """Show what is up, where, and whether the deployment is registered; exit code 1 if down."""
    from flows.cli.project import open_project
    from flows.cli.views.common import show_status

    stack = open_project()
    found = stack.status()
    if as_json:
        print_json(found.model_dump(mode="json"))
    else:
        show_status(open_console(), found, stack.layout().sign_in_link)
    if not found.up:
        raise typer.Exit(1)


def env_command() -> None:
    """Print what programs outside the project folder need: eval "$(qwen3ft env)".

    It contains the secret of the servers.
    """
    import shlex

    from deployments.services import client_variables
    from flows.cli.project import open_project
    from qwen3ft.errors import EnvironmentNotReadyError

    layout = open_project().layout()
    if not layout.secret:
        raise EnvironmentNotReadyError(
            "There are no servers to use yet.",
            why="They get their ports and their secret when they are first started.",
            next_command="qwen3ft up",
        )
    for name, value in client_variables(layout).items():
        typer.echo(f"export {name}={shlex.quote(value)}")


def deploy_command() -> None:
    """Register the deployment qwen3-finetune/default (and start the servers if need be)."""
    from deployments.deploy import deploy
    from flows.cli.project import open_project

    stack = open_project()
    stack.up(say)
    deploy(stack, say, force=True)


def schedule_command(
    cron: Annotated[
        str | None, typer.Option("--cron", metavar="FIELDS", help='For example "30 1 * * *".')
    ] = None,
    timezone: Annotated[
        str | None, typer.Option("--timezone", metavar="ZONE", help="For example Europe/Berlin.")
    ] = None,
    active: Annotated[
        bool | None, typer.Option("--on/--off", help="Switch the nightly run on or off.")
    ] = None,
) -> None:
    """Show or change when the nightly run starts, and switch it on or off, on the server."""
    from deployments.deploy import deploy
    from deployments.schedule import change_schedule, check_schedule, read_schedule
    from flows.cli.project import open_project

    stack = open_project()
    given = {"cron": cron, "timezone": timezone, "active": active}
    changes = {name: value for name, value in given.items() if value is not None}
    if not changes and stack.status().prefect_url is None:
        up = runnable("qwen3ft up")
        open_console().print(f"nightly  unknown, because the server is down; to see it: {up}")
        return
    if changes:
        check_schedule(cron or "0 2 * * *", timezone or "UTC")  # before anything is started
        stack.up(say)
        deploy(stack, say)
    now = change_schedule(stack, **changes) if changes else read_schedule(stack)
    state = "on" if now.active else "off"
    times = f'cron "{now.cron}"' if now.cron else "an interval or RRule (--cron replaces it)"
    open_console().print(f"nightly  {times}, time zone {now.timezone}: {state}")


def doctor_command(as_json: JsonOption = False) -> None:
    """Check this machine and show what it has and what is missing; exit code 1 if something is."""
    from flows.cli.project import open_project
    from flows.cli.views.common import show_report, show_status
    from qwen3ft.machine.environment import EnvironmentManager

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
        show_status(open_console(), found, stack.layout().sign_in_link)
    if problems:
        raise typer.Exit(1)


def _problems(manager: EnvironmentManager) -> list[str]:
    from qwen3ft.errors import EnvironmentNotReadyError

    try:
        manager.validate_environment()
    except EnvironmentNotReadyError as error:
        return list(error.facts.get("problems", [error.what]))
    return []
