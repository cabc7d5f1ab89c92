"""The command `qwen3ft`: everything the project does, by hand.

This file is the table of contents: names, options and help. What a command does is imported when it
is called, so that `qwen3ft --help` is immediate. Errors of the project are shown as what, why and
the next command, with exit code 1; wrong usage is 2. With `--json`, standard output holds one JSON
object and nothing else. Commands act on the project folder that the working folder lies in.
"""

from __future__ import annotations

import os
import sys
from typing import Annotated

import typer

from flows.cli_options import ConfigOption, JsonOption, ResumeOption, SetOption
from flows.cli_use import use_app
from qwen3ft.errors import FinetuneError

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)

data_app = typer.Typer(no_args_is_help=True, help="Look at data before training on it.")
app.add_typer(data_app, name="data")
app.add_typer(use_app)

PathsArgument = Annotated[
    list[str] | None,
    typer.Argument(metavar="PATH...", help="Files, folders, globs, hub names; or the config's."),
]


@app.callback()
def _options(
    debug: Annotated[bool, typer.Option("--debug", help="Show tracebacks of errors.")] = False,
) -> None:
    """Fine-tune Qwen3 inside a memory budget, prove that it got better, promote it."""
    # `main` takes --debug out first, so that it may stand anywhere; here it is only documented


@app.command()
def run(
    config: ConfigOption = None,
    settings: SetOption = None,
    resume: ResumeOption = None,
    as_json: JsonOption = False,
) -> None:
    """Start a run of the deployment (and the servers, if need be) and follow it to its result."""
    from flows import cli_runs

    cli_runs.run(config, settings or [], resume, as_json=as_json)


@app.command()
def train(
    config: ConfigOption = None,
    settings: SetOption = None,
    resume: ResumeOption = None,
    as_json: JsonOption = False,
) -> None:
    """Run the same flow in this process, without a server or a worker."""
    from flows import cli_runs

    cli_runs.train(config, settings or [], resume, as_json=as_json)


@app.command()
def plan(
    model: Annotated[
        str | None,
        typer.Option(
            "--model", "-m", metavar="4b|NAME|DIR", help="A Qwen3; with --sweep also all."
        ),
    ] = None,
    budget: Annotated[
        float | None, typer.Option("--budget", "-b", metavar="GB", help="Memory allowed.")
    ] = None,
    seq: Annotated[int | None, typer.Option("--seq", metavar="TOKENS", help="Longest row.")] = None,
    batch: Annotated[
        str | None, typer.Option("--batch", metavar="4x16", help="Sequences a step.")
    ] = None,
    gpu: Annotated[
        str | None,
        typer.Option("--gpu", metavar="NAME", help='h200, "RTX 4090", ..., this, or none.'),
    ] = None,
    fill: Annotated[
        float | None,
        typer.Option(
            "--fill", metavar="SHARE", min=0.001, max=1, help="Mean row over longest [0.42]."
        ),
    ] = None,
    sweep: Annotated[
        bool, typer.Option("--sweep", help="A table of budgets and sequence lengths.")
    ] = False,
    config: ConfigOption = None,
    settings: SetOption = None,
    as_json: JsonOption = False,
) -> None:
    """Predict what fits a memory budget, how fast by estimate, and why, without training.

    With any option from --model to --sweep: at once, from the model's shape.

    Without them: the run that the settings describe, for which the model is
    quantised and the data read once.
    """
    from flows import cli_plan

    question = cli_plan.Question(model, budget, seq, batch, gpu, fill, sweep)
    if question.is_about_shapes:
        cli_plan.answer(question, config, settings or [], as_json=as_json)
        return
    from flows import cli_runs

    cli_runs.plan(config, settings or [], as_json=as_json)


@data_app.command("check")
def data_check(
    paths: PathsArgument = None,
    config: ConfigOption = None,
    settings: SetOption = None,
    as_json: JsonOption = False,
) -> None:
    """Show what a run would train on; exit code 1 if it would not start."""
    from flows import cli_data

    cli_data.check(paths or [], config, settings or [], as_json=as_json)


@data_app.command("preview")
def data_preview(
    paths: PathsArgument = None,
    row: Annotated[int, typer.Option("--row", min=1, help="Which training row, from 1.")] = 1,
    config: ConfigOption = None,
    settings: SetOption = None,
    as_json: JsonOption = False,
) -> None:
    """Show one training row token by token: what is given, and what is trained."""
    from flows import cli_data

    cli_data.preview(paths or [], row, config, settings or [], as_json=as_json)


@app.command()
def doctor(as_json: JsonOption = False) -> None:
    """Say what this machine is, and what it lacks."""
    from flows import cli_servers

    cli_servers.doctor(as_json=as_json)


@app.command()
def up(
    stay: Annotated[
        bool, typer.Option("--stay", help="Restart what ends, until Ctrl-C or qwen3ft down.")
    ] = False,
    write_unit: Annotated[
        bool, typer.Option("--write-unit", help="Only write a systemd user unit that does so.")
    ] = False,
) -> None:
    """Start the local servers (Prefect, MLflow, one worker); what is up stays as it is."""
    from flows import cli_servers

    cli_servers.up(stay=stay, unit=write_unit)


@app.command()
def down() -> None:
    """Stop the local servers and whatever runs on them."""
    from flows import cli_servers

    cli_servers.down()


@app.command()
def status(as_json: JsonOption = False) -> None:
    """Say what is up, where, and whether the deployment is registered."""
    from flows import cli_servers

    cli_servers.status(as_json=as_json)


@app.command()
def deploy() -> None:
    """Register the deployment qwen3-finetune/default (and start the servers, if need be)."""
    from flows import cli_servers

    cli_servers.deploy()


@app.command()
def clean(
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Show what would go, and remove nothing.")
    ] = False,
    keep_days: Annotated[
        float, typer.Option("--keep-days", min=0, help="Runs, models and history younger stay.")
    ] = 30.0,
    keep_runs: Annotated[
        int, typer.Option("--keep-runs", min=0, help="So many of the newest runs stay.")
    ] = 20,
    abandon: Annotated[
        list[str] | None,
        typer.Option("--abandon", metavar="RUN_ID", help="A failed run not to be continued."),
    ] = None,
    config: ConfigOption = None,
    settings: SetOption = None,
    as_json: JsonOption = False,
) -> None:
    """Remove old checkpoints, runs, quantised models and flow-run history.

    Stays: what an adapter in use, a run in progress or a run that can be continued needs.
    """
    from flows import cli_clean
    from qwen3ft.operations.retention import RetentionPolicy

    policy = RetentionPolicy(keep_days=keep_days, keep_runs=keep_runs, abandon=tuple(abandon or ()))
    cli_clean.clean(policy, config, settings or [], dry_run=dry_run, as_json=as_json)


@app.command()
def schedule(
    cron: Annotated[
        str | None, typer.Option("--cron", metavar="FIELDS", help='Such as "30 1 * * *".')
    ] = None,
    timezone: Annotated[
        str | None, typer.Option("--timezone", metavar="ZONE", help="Such as Europe/Berlin.")
    ] = None,
    active: Annotated[
        bool | None, typer.Option("--on/--off", help="Switch the nightly run on or off.")
    ] = None,
) -> None:
    """Show or change when the nightly run starts (in deployments/prefect.yaml), and register it."""
    from flows import cli_servers

    cli_servers.schedule(cron, timezone, active=active)


@app.command()
def sync(config: ConfigOption = None, settings: SetOption = None) -> None:
    """Send to MLflow what it could not take when runs ended."""
    from flows import cli_runs

    cli_runs.sync(config, settings or [])


def main() -> int:
    """The entry point: runs the command, and shows errors of the project without a traceback."""
    arguments = [argument for argument in sys.argv[1:] if argument != "--debug"]
    debug = len(arguments) < len(sys.argv) - 1
    if debug:
        os.environ["QWEN3FT_DEBUG"] = "1"  # for Prefect's log: see tasks.policies
    try:
        app(args=arguments)
    except FinetuneError as error:
        if debug:
            raise
        from flows import cli_view

        if "--json" in arguments:
            cli_view.print_json({"error": error.to_dict()})
        else:
            cli_view.show_error(cli_view.open_console(stderr=True), error)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
