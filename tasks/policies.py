"""What tasks share: what a cached result depends on, what to retry, what a failure looks like."""

from __future__ import annotations

import logging
import os
from typing import Any

from prefect.client.schemas.objects import State, TaskRun
from prefect.tasks import Task

from qwen3ft.errors import FinetuneError, TransientError
from qwen3ft.files import sha256_json

RESULTS_VERSION = 2
"""Raised when results of older versions must not be reused."""

RETRY_DELAYS_SECONDS = [2.0, 10.0, 30.0]


def cache_key(stage: str, *values: Any) -> str:
    """The key of a stage's result: everything it depends on, as JSON-compatible values.

    Paths named in `values` are targets derived from content, never measured from the disk: a key
    computed before the body runs cannot describe what the body makes. Whether a cached path still
    holds is checked by the caller, who then sets `refresh_cache`.
    """
    return f"{stage}-{sha256_json([RESULTS_VERSION, *values])}"


def is_transient(task: Task[Any, Any], run: TaskRun, state: State[Any]) -> bool:  # noqa: ARG001
    """Whether a failed task may succeed if it is called again unchanged."""
    error = state.result(raise_on_failure=False)
    return isinstance(error, TransientError)


DEBUG_VARIABLE = "QWEN3FT_DEBUG"


def hide_known_tracebacks() -> None:
    """Let Prefect log a `FinetuneError` by its own words; the variable QWEN3FT_DEBUG shows all."""
    if not os.environ.get(DEBUG_VARIABLE):
        for name in ("prefect.flow_runs", "prefect.task_runs"):
            logging.getLogger(name).addFilter(_without_known_traceback)  # adding twice adds once


def _without_known_traceback(record: logging.LogRecord) -> bool:
    if record.exc_info and isinstance(record.exc_info[1], FinetuneError):
        # its message follows in the state that Prefect logs next
        record.msg, record.args = "ended by %s", (type(record.exc_info[1]).__name__,)
        record.exc_info = None
    return True
