"""The project folder that a command acts on, the settings it was given, the servers it uses."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from deployments import services
from deployments.deploy import PREFECT_FILE, PROJECT_FILE, choose_defaults
from deployments.prefect_api import read_deployment
from deployments.stack import Stack
from flows.cli.options import read_overrides
from flows.cli.output import say
from qwen3ft.config import (
    TrainingConfig,
    merge_settings,
    parse_config,
    read_settings_file,
)
from qwen3ft.disk.files import make_folder
from qwen3ft.errors import EnvironmentNotReadyError
from qwen3ft.jobs.folders import RunDir
from qwen3ft.operations.resumption import find_begun_run, own_settings, resumed_settings
from qwen3ft.settings import CHANGEABLE_SETTINGS, with_partners

_MARKS = (PROJECT_FILE, PREFECT_FILE, Path(".qwen3ft/secret"))
"""Each of them makes its folder a project folder; the secret is there once servers were."""
_LEFT_BEHIND = Path(".qwen3ft")
"""Folder that any command leaves; it marks the working folder alone, or one look would mark all
below."""


def open_project(*, anywhere: bool = False) -> Stack:
    """Make the project folder the working folder, and return its stack.

    A project folder holds qwen3ft.yaml, or deployments/prefect.yaml as a clone does, or a stack's
    secret; the working folder itself also if an earlier command left something there.

    Args:
        anywhere: If the working folder is not inside a project folder, take it for one.

    Raises:
        EnvironmentNotReadyError: it is not.
    """
    here = Path.cwd()
    for folder in (here, *here.parents):
        marks = (*_MARKS, _LEFT_BEHIND) if folder == here else _MARKS
        if any((folder / mark).exists() for mark in marks):
            os.chdir(folder)  # so that relative paths of a config mean the same as in the worker
            return Stack(folder)
    if anywhere:
        return Stack(here)
    raise EnvironmentNotReadyError(
        f"{here} is not inside a project folder.",
        why=f"Neither it nor a folder above it holds {PROJECT_FILE}.",
        next_command="qwen3ft init",
    )


def requested_settings(
    root: Path, config: Path | None, settings: list[str] | None
) -> tuple[dict[str, Any], str | None]:
    """Return the settings asked for, not yet validated, and a notice for the user about them.

    They start from the file if one is given, else from what the deployment starts from on this
    machine; but a model named by hand starts from the defaults, not from another model's settings.
    """
    overrides = read_overrides(settings)
    if config is not None:
        return read_settings_file(config) | overrides, None
    defaults = choose_defaults(root)
    values = merge_settings(defaults.config, overrides)
    is_other_model = values.get("model_name") != defaults.config.get("model_name")
    return values, None if is_other_model else defaults.notice


def request_config(
    root: Path, config: Path | None, settings: list[str] | None, *, notify: bool = False
) -> TrainingConfig:
    """Return the settings asked for, validated.

    Args:
        root: The project folder.
        config: Settings file.
        settings: What was typed after --set.
        notify: Print the notice about them if there is one: where the model matters.

    Raises:
        ConfigError: a setting or the file is invalid.
    """
    values, notice = requested_settings(root, config, settings)
    wanted = parse_config(values)
    if notice and notify:
        say(notice)
    return wanted


def run_parameters(root: Path, config: Path | None, settings: list[str] | None) -> dict[str, Any]:
    """Return the flow parameters that replace the deployment's, validated.

    Raises:
        ConfigError: a setting or the file is invalid.
    """
    if config is None and not settings:
        return {}
    values, _ = requested_settings(root, config, settings)
    return {"config": parse_config(values).model_dump(mode="json")}


def find_run_to_resume(
    root: Path, config: Path | None, settings: list[str] | None, run_id: str
) -> tuple[RunDir, TrainingConfig]:
    """Return a run's folder, and its own settings with those that were asked to change.

    Raises:
        ConfigError: there is no such run, or a setting is invalid or may not change.
    """
    asked = read_overrides(settings)
    if config is not None:
        asked = read_settings_file(config) | asked
    run = find_begun_run(asked.get("runs_dir") or _usual_runs_dir(root), run_id)
    return run, resumed_settings(run, asked)


def _usual_runs_dir(root: Path) -> str:
    return parse_config(choose_defaults(root).config).runs_dir


def resume_parameters(run: RunDir, config: TrainingConfig) -> dict[str, Any]:
    """Return the flow parameters that resume a run: its id, its place, and what is to change.

    Nothing else but what is checked along with it: the flow takes a request with all settings of
    the deployment for its form, in which what equals the deployment's was not asked for.
    """
    own, wanted = (each.model_dump(mode="json") for each in (own_settings(run), config))
    names = [name for name in CHANGEABLE_SETTINGS if wanted[name] != own[name]]
    settings = {name: wanted[name] for name in ("runs_dir", *names)}
    return {"continue_run": run.path.name, "config": with_partners(settings, wanted)}


def run_folder(stack: Stack, parameters: dict[str, Any], run_id: str) -> Path:
    """Return the folder of a run that was started with these flow parameters."""
    registered = (read_deployment(stack.layout()) or {}).get("parameters", {})
    config = parse_config(
        merge_settings(registered.get("config") or {}, parameters.get("config") or {})
    )
    return (stack.root / config.runs_dir / run_id).resolve()


def use_local_services(stack: Stack) -> None:
    """Point this process at the stack's servers where they are up, else at their databases.

    Variables that the shell exported are kept: here, unlike in the stack, the user may mean another
    server.
    """
    layout, found = stack.layout(), stack.status()
    make_folder(layout.prefect_home, 0o700)  # or Prefect warns that it cannot make it
    values = services.environment(layout)
    if found.prefect_url is None:
        # empty, not absent: prefect.toml of a stack that did not end in order names it still
        values |= {"PREFECT_API_URL": "", "PREFECT_UI_URL": ""}
    if found.mlflow_url is None:
        values["MLFLOW_TRACKING_URI"] = layout.mlflow_store
    for address in ("PREFECT_API_URL", "MLFLOW_TRACKING_URI"):
        if os.environ.get(address, values[address]) != values[address]:
            # another server, which must not be sent the secret of this one
            for name in services.access(layout):
                if name.startswith(address.partition("_")[0]):
                    values.pop(name, None)
    for name, value in values.items():
        os.environ.setdefault(name, value)
