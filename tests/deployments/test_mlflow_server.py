"""MLflow's application, as our servers start it."""

from __future__ import annotations

import os
import subprocess
import sys

REQUESTS = """
from deployments.mlflow_server import create_app
create_app()

import importlib
from sqlalchemy.orm.mapper import _all_registries

def tables():
    return {mapper.class_.__name__ for each in _all_registries() for mapper in each.mappers}

before = tables()
# What the handlers of requests import: tracking, registry, jobs, and the charts' queries.
for store in ("tracking", "model_registry", "jobs"):
    importlib.import_module(f"mlflow.store.{store}.sqlalchemy_store")
from mlflow.server.handlers import _get_graphql_auth_middleware
_get_graphql_auth_middleware()
print("new:", sorted(tables() - before))
"""


def test_no_request_is_the_first_to_load_a_table() -> None:
    """Two requests that load tables at the same time leave a registry that answers 500 for ever."""
    environment = os.environ | {"MLFLOW_TRACKING_PASSWORD": "secret"}
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", REQUESTS],
        env=environment,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.stdout.splitlines()[-1:] == ["new: []"], done.stderr[-2000:]
