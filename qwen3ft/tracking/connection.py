"""Where MLflow is: its URI, and what follows from it alone. Nothing is opened or asked here."""

from __future__ import annotations

import os
from pathlib import Path

from qwen3ft.tracking.cursor import TrackingState

_SQLITE = "sqlite:///"


def default_tracking_uri() -> str:
    """MLFLOW_TRACKING_URI, or the database `mlruns/mlflow.db` of the working folder."""
    default = f"{_SQLITE}{Path.cwd() / 'mlruns' / 'mlflow.db'}"
    return os.environ.get("MLFLOW_TRACKING_URI") or default


def database_path(tracking_uri: str) -> Path | None:
    """The file of a SQLite tracking URI; None for any other."""
    if not tracking_uri.startswith(_SQLITE):
        return None
    return Path(tracking_uri.removeprefix(_SQLITE).partition("?")[0]).absolute()


def artifact_root(database: Path) -> Path:
    """Where the artifacts of a database lie: beside it, also when a server is in front of it."""
    return database.parent / "artifacts"


def run_url(tracking_uri: str, state: TrackingState) -> str | None:
    """The page of the parent run; None for a database without a server, or before it was sent."""
    if not tracking_uri.startswith("http") or state.parent_run_id is None:
        return None
    page = f"experiments/{state.experiment_id}/runs/{state.parent_run_id}"
    # MLflow opens in its view for prompts and traces unless told otherwise
    return f"{tracking_uri.rstrip('/')}/#/{page}?workflowType=machine_learning"
