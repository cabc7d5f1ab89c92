"""The commands that start runs, and the one that sends to MLflow what it lacks."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from flows.cli.options import ConfigOption, JsonOption, ResumeOption, SetOption
from flows.cli.output import open_console, print_json, say

if TYPE_CHECKING:
    from deployments.services import Layout
    from flows.cli.follow import StateChange
    from flows.cli.tails import LockTail, MetricsTail
    from qwen3ft.config import TrainingConfig
    from qwen3ft.errors import FinetuneError
    from qwen3ft.jobs.folders import RunDir


def run_command(
    config: ConfigOption = None,
    settings: SetOption = None,
    resume: ResumeOption = None,
    as_json: JsonOption = False,
) -> None:
    """Start a run on the local servers (started if need be) and follow it to its result."""
    from deployments.deploy import deploy
    from deployments.services import DEPLOYMENT
    from flows.cli.follow import start_run
    from flows.cli.project import (
        open_project,
        resume_parameters,
        run_folder,
        run_parameters,
    )
    from flows.cli.tails import tails_from_now
    from qwen3ft.machine.environment import EnvironmentManager

    stack, found = open_project(), None
    if resume is None:
        parameters = run_parameters(stack.root, config, settings)
    elif (found := _find_unfinished(stack.root, config, settings, resume, as_json=as_json)) is None:
        return
    else:
        parameters = resume_parameters(*found)
    tails = None if found is None else tails_from_now(found[0])
    EnvironmentManager(stack.root).validate_environment()
    stack.up(say)
    deploy(stack, say)
    say(f"$ prefect deployment run {DEPLOYMENT}")
    flow_run_id = start_run(stack, parameters)
    layout = stack.layout()
    say(layout.sign_in_link(layout.flow_run_url(flow_run_id)))
    folder = run_folder(stack, parameters, resume or flow_run_id)
    _follow_to_end(layout, flow_run_id, folder, tails, as_json=as_json)


def follow_command(
    run: Annotated[
        str | None,
        typer.Argument(metavar="RUN_ID", help="By default the run that is in progress."),
    ] = None,
    as_json: JsonOption = False,
) -> None:
    """Follow a run of the local servers to its result; Ctrl-C ends the following, not the run."""
    from flows.cli.follow import find_run
    from flows.cli.project import open_project, run_folder

    stack = open_project()
    if stack.status().prefect_url is None:
        raise _no_server()
    found = find_run(stack.layout(), run)
    run_id = found["parameters"].get("continue_run") or found["id"]
    say(f"run {found['id']} ({found['name']})")
    folder = run_folder(stack, found["parameters"], run_id)
    _follow_to_end(stack.layout(), found["id"], folder, None, as_json=as_json)


def train_command(
    config: ConfigOption = None,
    settings: SetOption = None,
    resume: ResumeOption = None,
    as_json: JsonOption = False,
) -> None:
    """Run the same flow in this process, without a worker; no server needs to be up."""
    from flows.cli.project import open_project, request_config, use_local_services
    from qwen3ft.machine.environment import EnvironmentManager

    stack = open_project(anywhere=True)
    if resume is None:
        wanted = request_config(stack.root, config, settings, notify=True)
    elif (found := _find_unfinished(stack.root, config, settings, resume, as_json=as_json)) is None:
        return
    else:
        wanted = found[1]
    EnvironmentManager(stack.root).validate_environment()
    use_local_services(stack)
    # Prefect reads its settings when it is imported
    from flows.cli.progress import training_progress
    from flows.finetune import run_in_process

    with training_progress(open_console(stderr=True), Path(wanted.runs_dir).resolve()) as began:
        state = run_in_process(wanted, resume, began)
    result = state.result(raise_on_failure=False)
    if isinstance(result, BaseException):
        raise result
    run_id = resume or str(state.state_details.flow_run_id)
    folder = Path(wanted.runs_dir) / run_id
    _show_end(stack.layout(), state.name, state.message or "", folder, as_json=as_json)


def sync_command(config: ConfigOption = None, settings: SetOption = None) -> None:
    """Send to MLflow what it could not take when runs ended; exit code 1 if something is left."""
    from flows.cli.project import open_project, request_config, use_local_services
    from qwen3ft.tracking.mirror import replay_unsent
    from qwen3ft.tracking.uri import default_tracking_uri

    stack = open_project()
    wanted = request_config(stack.root, config, settings)
    use_local_services(stack)
    left = replay_unsent(Path(wanted.runs_dir), default_tracking_uri())
    say("MLflow has every run." if left == 0 else f"{left} run(s) could not be sent completely.")
    if left:
        raise typer.Exit(1)


def _follow_to_end(
    layout: Layout,
    flow_run_id: str,
    folder: Path,
    tails: tuple[MetricsTail, LockTail] | None,
    *,
    as_json: bool,
) -> None:
    """Show a run until it ends, then its result.

    Without `tails` what its files hold already is shown too.

    Raises:
        FinetuneError: it did not complete.
    """
    from flows.cli.follow import follow_run
    from flows.cli.tails import tails_of
    from qwen3ft.jobs.folders import RunDir

    shown = tails or tails_of(RunDir(folder))
    last = follow_run(layout, flow_run_id, shown, open_console(stderr=as_json))
    if last.state_type != "COMPLETED":
        raise _run_failed(last, folder, layout.log("worker"))
    _show_end(layout, last.state, last.message, folder, as_json=as_json)


def _no_server() -> FinetuneError:
    from qwen3ft.errors import EnvironmentNotReadyError

    return EnvironmentNotReadyError(
        "The Prefect server is down.",
        why="Runs are followed on it; those that were in progress are taken up when it is back.",
        next_command="qwen3ft up",
    )


def _find_unfinished(
    root: Path, config: Path | None, settings: list[str] | None, run_id: str, *, as_json: bool
) -> tuple[RunDir, TrainingConfig] | None:
    """Return the run to resume and its settings; say so if it has its verdict, and return None."""
    from flows.cli.project import find_run_to_resume
    from qwen3ft.operations.run_state import ending_of

    run, wanted = find_run_to_resume(root, config, settings, run_id)
    if (ending := ending_of(run)) is None:
        return run, wanted
    message = f"Run {run_id} is already completed: {ending}"
    print_json({"nothing_new": message}) if as_json else _print_whole(message)
    return None


def _run_failed(last: StateChange, folder: Path, worker_log: Path) -> FinetuneError:
    """Make an error of the run's last state message, and say where its log is."""
    from flows.cli.views.run import plain_message
    from qwen3ft.errors import FinetuneError
    from qwen3ft.jobs.folders import RunDir

    log = folder / "run.jsonl"
    if not log.exists():
        log = worker_log
    message = plain_message(last.message)
    what, _, rest = message.partition("\nWhy: ")
    why, _, command = rest.partition("\nNext: ")
    return FinetuneError(
        what or f"The run ended as {last.state}.",
        why=f"{why}\nLog: {log}".strip(),
        next_command=command or RunDir(folder).resume_command,
    )


def _show_end(
    layout: Layout, state: str | None, message: str, folder: Path, *, as_json: bool
) -> None:
    """Show the run's card, or the message of a run that had nothing to train on."""
    from flows.cli.views.common import show_card
    from qwen3ft.errors import FinetuneError
    from qwen3ft.jobs.folders import read_record
    from qwen3ft.records.run_card import ALREADY_DONE, NOTHING_NEW, RunCard

    path = folder / "card.json"
    if state in (NOTHING_NEW, ALREADY_DONE):
        shown: dict[str, Any] = {"nothing_new": message}
        print_json(shown) if as_json else _print_whole(message)
        return
    if not path.exists():
        raise FinetuneError(
            f"The run completed, but {path} is missing.",
            why="It was removed, or the run belongs to another project folder.",
            next_command="qwen3ft status",
        )
    card = read_record(path, RunCard)
    if as_json:
        print_json(card.model_dump(mode="json"))
    else:
        show_card(open_console(), card, layout.sign_in_link)


def _print_whole(message: str) -> None:
    """Print a message in one line, however narrow the terminal: it is copied and searched for."""
    open_console().print(message, soft_wrap=True)
