"""The table of commands, and how errors are shown.

Commands act on the project folder that the working folder lies in. Errors of the project are shown
as what, why and the next command, with exit code 1; wrong usage is exit code 2. With `--json`,
standard output holds one JSON object and nothing else.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from typing import Annotated

import typer

from flows.cli import (
    adapters,
    champion,
    clean,
    data,
    hub,
    init,
    plan,
    runs,
    serve,
    servers,
    settings,
)
from flows.cli.output import open_console, print_json
from qwen3ft.disk.files import PRIVATE_UMASK
from qwen3ft.errors import (
    CancelledError,
    EnvironmentNotReadyError,
    FinetuneError,
    WorkerCrashedError,
)
from qwen3ft.jobs.failures import translate
from qwen3ft.text.commands import with_typed

MOST_SHOWN = 400
"""Characters of a library's message that are shown."""

# `qwen3ft --help` imports all of these modules, so they import the rest inside their functions.
COMMANDS: dict[str, tuple[Callable[..., None], ...]] = {
    "Train": (
        init.init_command,
        runs.run_command,
        runs.train_command,
        runs.follow_command,
        plan.plan_command,
        settings.settings_command,
    ),
    "Use a fine-tuned model": (
        adapters.generate_command,
        adapters.chat_command,
        adapters.export_command,
        serve.serve_command,
        hub.push_command,
        champion.promote_command,
        champion.rollback_command,
        champion.history_command,
    ),
    "Local servers": (
        servers.up_command,
        servers.down_command,
        servers.status_command,
        servers.env_command,
        servers.deploy_command,
        servers.schedule_command,
    ),
    "Upkeep": (servers.doctor_command, clean.clean_command, runs.sync_command),
}
DATA_COMMANDS = (data.check_command, data.preview_command)

app = typer.Typer(
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
data_app = typer.Typer(no_args_is_help=True, help="Look at data before training on it.")


def _show_version(wanted: bool) -> None:
    if wanted:
        from importlib.metadata import version

        typer.echo(f"qwen3ft {version('qwen3ft')}")
        raise typer.Exit


@app.callback()
def _options(
    debug: Annotated[bool, typer.Option("--debug", help="Show tracebacks of errors.")] = False,
    version: Annotated[
        bool,
        typer.Option("--version", callback=_show_version, is_eager=True, help="Show the version."),
    ] = False,
) -> None:
    """Fine-tune Qwen3 inside a memory budget, prove that it got better, promote it."""
    # `main` takes --debug out first, so that it may stand anywhere; here it is only documented


for panel, commands in COMMANDS.items():
    for command in commands:
        name = command.__name__.removesuffix("_command")
        app.command(name, rich_help_panel=panel)(command)
for command in DATA_COMMANDS:
    data_app.command(command.__name__.removesuffix("_command"))(command)
app.add_typer(data_app, name="data", rich_help_panel="Train")


def _explained(error: FinetuneError | OSError) -> FinetuneError:
    """Return the error of this project for a file or folder that cannot be used."""
    if isinstance(error, FinetuneError):
        return error
    known = translate(error, "command")
    if not isinstance(known, WorkerCrashedError):
        return known
    return EnvironmentNotReadyError(
        f"A file or folder cannot be used: {str(error)[:MOST_SHOWN]!a}.",
        why="Its path does not exist, is too long, or leads through something that is no folder.",
        next_command="qwen3ft doctor",
    )


def main() -> int:
    """Run the command; show errors of the project without a traceback.

    Returns:
        The exit code.
    """
    os.umask(PRIVATE_UMASK)
    arguments = [argument for argument in sys.argv[1:] if argument != "--debug"]
    debug = len(arguments) < len(sys.argv) - 1
    if debug:
        os.environ["QWEN3FT_DEBUG"] = "1"  # for Prefect's log: see tasks.policies
    try:
        app(args=arguments, prog_name="qwen3ft")
    except (FinetuneError, OSError) as raised:
        if debug:
            raise
        error = _explained(raised)
        error.next_command = with_typed(error.next_command, arguments)
        if "--json" in arguments:
            print_json({"error": error.to_dict()})
        else:
            from flows.cli.views.common import show_error

            show_error(open_console(stderr=True), error)
        return 130 if isinstance(error, CancelledError) else 1
    return 0
