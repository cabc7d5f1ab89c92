"""MLflow's application behind the guard; `mlflow server --app-name qwen3ft` finds it by its name.

The name is declared in pyproject.toml, as MLflow asks of applications that wrap its own.
"""

from __future__ import annotations

import os
from contextlib import suppress
from importlib import import_module

from starlette.types import ASGIApp

from deployments.guard import Guard

_UPLOADS = (
    "/api/2.0/mlflow-artifacts/",  # files of artifacts, from the client
    "/v1/",  # traces and metrics as OpenTelemetry sends them
)
CLOSED = ("/mlflow/assistant",)
"""Parts of paths of what would run commands on this machine; MLflow has no setting to end it."""


def create_app() -> ASGIApp:
    """Make the application; uvicorn calls this in the server's process."""
    from mlflow.server.fastapi_app import app  # the command line that starts uvicorn needs none

    # MLflow imports these tables at the first request for its charts. If another request needs its
    # registry for the first time meanwhile, SQLAlchemy meets half of them, and all that has to do
    # with the registry is answered with 500 until the server is started again.
    with suppress(ImportError):
        import_module("mlflow.server.auth.db.models")
    secret = os.environ["MLFLOW_TRACKING_PASSWORD"]
    return Guard(app, secret, is_page=lambda path: path == "/", uploads=_UPLOADS, closed=CLOSED)
