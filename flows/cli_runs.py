"""The commands about runs: run (on the servers), train (in this process), plan and sync."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import typer

from deployments.deploy import deploy as register
from deployments.deploy import read_deployment
from deployments.stack import DEPLOYMENT, Stack
from flows.cli_project import open_project, request_config, run_parameters, use_local_services
from flows.cli_view import RunView, open_console, print_json, say, show_card
from flows.follow import Follower, MetricsTail, StateChange, start_run
from qwen3ft.config import parse_config
from qwen3ft.errors import FinetuneError
from qwen3ft.jobs.folders import RunDir, read_record
from qwen3ft.machine.environment import EnvironmentManager
from qwen3ft.operations.night import ALREADY_DONE
from qwen3ft.records.run_card import NOTHING_NEW, RunCard


def run(path: Path | None, settings: list[str], resume: str | None, *, as_json: bool) -> None:
    """Bring everything up, start a run of the deployment, follow it, show its card."""
    stack = open_project()
    parameters = run_parameters(stack.root, path, settings, resume)
    EnvironmentManager(stack.root).validate_environment()
    stack.up(say)
    register(stack, say)
    say(f"$ prefect deployment run {DEPLOYMENT}")
    flow_run_id = start_run(stack, parameters)
    say(stack.layout().flow_run_url(flow_run_id))
    folder = _run_folder(stack, parameters, resume or flow_run_id)
    last = _follow(stack, flow_run_id, folder, as_json=as_json)
    if last.state_type != "COMPLETED":
        raise _run_failed(last, folder, stack)
    if last.state in (NOTHING_NEW, ALREADY_DONE):
        _show_nothing_new(last.message, as_json=as_json)
    else:
        _show_result(folder, as_json=as_json)


def train(path: Path | None, settings: list[str], resume: str | None, *, as_json: bool) -> None:
    """Run the flow here and show its card."""
    stack = open_project()
    config = request_config(stack.root, path, settings)
    EnvironmentManager(stack.root).validate_environment()
    use_local_services(stack)
    from flows.finetune import run_in_process

    state = run_in_process(config, resume)
    result = state.result(raise_on_failure=False)
    if isinstance(result, BaseException):
        raise result
    run_id = resume or str(state.state_details.flow_run_id)
    if state.name in (NOTHING_NEW, ALREADY_DONE):
        _show_nothing_new(state.message or "", as_json=as_json)
    else:
        _show_result(Path(config.runs_dir) / run_id, as_json=as_json)


def plan(path: Path | None, settings: list[str], *, as_json: bool) -> None:
    """Show what a run would do."""
    stack = open_project()
    config = request_config(stack.root, path, settings)
    from flows.cli_plan_view import show_table
    from qwen3ft.operations.preview import preview_plan
    from qwen3ft.planning.table import run_table

    planned = preview_plan(config)
    table = run_table(config, EnvironmentManager(stack.root).report(), planned)
    if as_json:
        print_json(planned.model_dump(mode="json") | {"table": table.model_dump(mode="json")})
    else:
        show_table(open_console(), table)


def sync(path: Path | None, settings: list[str]) -> None:
    """Send what MLflow lacks; exit code 1 if something is left."""
    stack = open_project()
    config = request_config(stack.root, path, settings)
    use_local_services(stack)
    from qwen3ft.tracking.connection import default_tracking_uri
    from qwen3ft.tracking.mirror import replay_unsent

    left = replay_unsent(Path(config.runs_dir), default_tracking_uri())
    say("MLflow has every run." if left == 0 else f"{left} run(s) could not be sent completely.")
    if left:
        raise typer.Exit(1)


def _run_folder(stack: Stack, parameters: dict[str, Any], run_id: str) -> Path:
    registered = (read_deployment(stack) or {}).get("parameters", {})
    config = parse_config(parameters.get("config") or registered.get("config") or {})
    return (stack.root / config.runs_dir / run_id).resolve()


def _follow(stack: Stack, flow_run_id: str, folder: Path, *, as_json: bool) -> StateChange:
    """Show the run until it ends; gives its final state."""
    api = f"{stack.layout().url('prefect')}/api"
    follower = Follower(api, flow_run_id, MetricsTail(RunDir(folder)))
    last = StateChange(name="run", state="Unknown", state_type="")
    try:
        with RunView(open_console(stderr=as_json)) as view:
            for event in follower.events():
                if isinstance(event, StateChange):
                    last = event
                    view.change(event)
                else:
                    view.progress(event)
    except KeyboardInterrupt:
        say(f"The run goes on. To end it: .venv/bin/prefect flow-run cancel {flow_run_id}")
        raise typer.Exit(130) from None
    return last


def _run_failed(last: StateChange, folder: Path, stack: Stack) -> FinetuneError:
    """The error that the run's state message tells of, and where its log is."""
    log = folder / "run.jsonl"
    if not log.exists():
        log = stack.layout().log("worker")
    message = last.message.removeprefix("Flow run encountered an exception: ")
    what, _, rest = message.partition("\nWhy: ")
    why, _, command = rest.partition("\nNext: ")
    return FinetuneError(
        what or f"The run ended as {last.state}.",
        why=f"{why}\nLog: {log}".strip(),
        next_command=command or f"qwen3ft run --resume {folder.name}",
    )


def _show_nothing_new(message: str, *, as_json: bool) -> None:
    if as_json:
        print_json({"nothing_new": message})
    else:
        open_console().print(message)


def _show_result(folder: Path, *, as_json: bool) -> None:
    path = folder / "card.json"
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
        show_card(open_console(), card)
