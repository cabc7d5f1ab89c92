"""What the commands act on: the project folder, the settings asked for, the services to use."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from deployments import services
from deployments.deploy import PREFECT_FILE, choose_defaults
from deployments.stack import Stack
from flows.cli_settings import read_overrides
from flows.cli_view import say
from qwen3ft.config import TrainingConfig, parse_config, read_settings_file
from qwen3ft.errors import EnvironmentNotReadyError


def open_project() -> Stack:
    """The stack of the project folder, which becomes the working folder."""
    here = Path.cwd()
    for folder in (here, *here.parents):
        if (folder / PREFECT_FILE).exists():
            os.chdir(folder)  # relative paths of a config mean the same as in the worker
            return Stack(folder)
    raise EnvironmentNotReadyError(
        f"{here} is not inside a project folder.",
        why=f"Neither it nor a folder above it holds {PREFECT_FILE}.",
        next_command="cd /path/to/the/project",
    )


def read_request(
    root: Path, path: Path | None, settings: list[str]
) -> tuple[dict[str, Any], str | None]:
    """The settings asked for, and what a person must be told about them.

    They start from the file if one is given, else from what the deployment starts from on this
    machine; but a model named by hand starts from the defaults, not from another model's settings.
    """
    overrides = read_overrides(settings)
    if path is not None:
        return read_settings_file(path) | overrides, None
    if "model_name" in overrides:
        return overrides, None
    defaults = choose_defaults(root)
    return defaults.config | overrides, defaults.notice


def request_config(root: Path, path: Path | None, settings: list[str]) -> TrainingConfig:
    """The settings asked for, validated; a choice made for the user is said.

    Raises:
        ConfigError: a setting or the file is invalid.
    """
    values, notice = read_request(root, path, settings)
    if notice:
        say(notice)
    return parse_config(values)


def run_parameters(
    root: Path, path: Path | None, settings: list[str], resume: str | None
) -> dict[str, Any]:
    """Flow parameters that differ from the deployment's; checked before anything is started."""
    parameters: dict[str, Any] = {"continue_run": resume} if resume else {}
    if path is not None or settings:
        values, _ = read_request(root, path, settings)
        parameters["config"] = parse_config(values).model_dump(mode="json")
    return parameters


def use_local_services(stack: Stack) -> None:
    """Point this process at the stack's servers where they are up, else at their databases.

    What the shell exported is kept: here, unlike in the stack, a person may mean another server.
    """
    layout, found = stack.layout(), stack.status()
    values = services.environment(layout)
    if found.prefect_url is None:
        del values["PREFECT_API_URL"]
        # Prefect then serves itself inside this process, and at exit prints what only it minds
        values["PREFECT_SERVER_LOGGING_LEVEL"] = "CRITICAL"
    if found.mlflow_url is None:
        values["MLFLOW_TRACKING_URI"] = layout.mlflow_store
    for name, value in values.items():
        os.environ.setdefault(name, value)
