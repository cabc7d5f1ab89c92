"""Objects that other programs import by name: the script of pip, MLflow, Prefect, notebooks.

`flows`, `tasks` and `deployments` lie beside this package in a clone, and inside it in a wheel (see
hatch_build.py). The names here are the same in both.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from starlette.types import ASGIApp


def run_command_line() -> int:
    """Run the command `qwen3ft`; return its exit code."""
    from flows.cli import main

    return main()


def create_mlflow_app() -> ASGIApp:
    """Make MLflow's application behind the guard; `mlflow server --app-name qwen3ft` calls it."""
    from deployments.mlflow_server import create_app

    return create_app()


def _load_pyfunc(path: str) -> Any:
    """Load a registered version; MLflow calls it for an adapter whose MLmodel names this module."""
    from pathlib import Path

    from qwen3ft.serving.mlflow_model import MlflowModel

    return MlflowModel(Path(path))


def deployment_defaults() -> dict[str, Any]:
    """Return the settings and version of the deployment, as a build step of prefect.yaml."""
    from deployments.deploy import defaults_step

    return defaults_step()


def __getattr__(name: str) -> Any:
    if name == "qwen3_finetune":  # the deployment's entry point
        from flows.finetune import qwen3_finetune

        return qwen3_finetune
    if name == "qwen3_finetune_join":  # that of the other hosts of a run
        from flows.join import qwen3_finetune_join

        return qwen3_finetune_join
    if name in ("Run", "finetune", "open_chat", "project"):  # public names of `qwen3ft`
        from flows import api

        return getattr(api, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
