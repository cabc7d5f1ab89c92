"""Addresses of MLflow, and what follows from an address alone. Only `is_answering` opens one."""

from __future__ import annotations

import os
import urllib.error
import urllib.request
from http.client import HTTPException
from pathlib import Path
from urllib.parse import quote

from qwen3ft.tracking.cursor import TrackingState
from qwen3ft.tracking.experiment import TRAINING_VIEW
from qwen3ft.tracking.journal import PARENT_RUN

_SQLITE = "sqlite:///"


def default_tracking_uri() -> str:
    """Return MLFLOW_TRACKING_URI, or the URI of `mlruns/mlflow.db` in the working folder."""
    default = f"{_SQLITE}{Path.cwd() / 'mlruns' / 'mlflow.db'}"
    return os.environ.get("MLFLOW_TRACKING_URI") or default


def database_path(tracking_uri: str) -> Path | None:
    """Return the file of a SQLite tracking URI; None for any other URI."""
    if not tracking_uri.startswith(_SQLITE):
        return None
    return Path(tracking_uri.removeprefix(_SQLITE).partition("?")[0]).absolute()


def artifact_root(database: Path) -> Path:
    """Return the folder of a database's artifacts: beside it, even behind a server."""
    return database.parent / "artifacts"


def run_url(tracking_uri: str, state: TrackingState) -> str | None:
    """Return the page of the parent run; None without a server, or before the run was sent."""
    if not tracking_uri.startswith("http") or state.parent_run_id is None:
        return None
    page = f"experiments/{state.experiment_id}/runs/{state.parent_run_id}"
    return f"{tracking_uri.rstrip('/')}/#/{page}?{TRAINING_VIEW}"


def artifact_address(path: str) -> str:
    """Return the address of an artifact of the parent run, as MLflow's own pages write it.

    Its `PARENT_RUN` becomes the id of that run when a tag is sent.
    """
    return f"get-artifact?path={quote(path, safe='')}&run_uuid={PARENT_RUN}"


def is_answering(tracking_uri: str, timeout_seconds: float = 5.0) -> bool:
    """Return True if a server answers in time, whatever it says; a database always does."""
    if not tracking_uri.startswith("http"):
        return True
    address = f"{tracking_uri.rstrip('/')}/health"
    try:
        with urllib.request.urlopen(address, timeout=timeout_seconds):  # noqa: S310 - http
            return True
    except urllib.error.HTTPError:
        return True
    except (OSError, HTTPException):  # nothing there, or nothing that speaks HTTP
        return False
