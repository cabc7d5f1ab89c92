"""The commands about this machine and its servers: doctor, up, down, status, deploy."""

from __future__ import annotations

import typer

from deployments.deploy import deploy as register
from flows.cli_project import open_project
from flows.cli_view import open_console, print_json, say, show_report, show_status
from qwen3ft.environment import EnvironmentManager
from qwen3ft.errors import EnvironmentNotReadyError


def up() -> None:
    """Start what is down, then say what is up."""
    show_status(open_console(), open_project().up(say))


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
