"""Caching, retries and log messages that tasks share."""

from __future__ import annotations

import logging
import os
from typing import Any

from prefect.client.schemas.objects import State, TaskRun
from prefect.tasks import Task

from qwen3ft.disk.files import sha256_json
from qwen3ft.errors import FinetuneError, TransientError
from qwen3ft.logs import get_logger

logger = get_logger("flow")

RESULTS_VERSION = 2
"""Increased when cached results of older versions must not be reused."""

RETRY_DELAYS_SECONDS = [2.0, 10.0, 30.0]


def cache_key(stage: str, *values: Any) -> str:
    """Return the key of a stage's result, given everything it depends on as JSON values.

    Paths in `values` are targets derived from content, never read from the disk: a key computed
    before the body runs cannot describe its output. The caller checks that a cached path is still
    intact, and sets `refresh_cache` if it is not.
    """
    return f"{stage}-{sha256_json([RESULTS_VERSION, *values])}"


def is_transient(task: Task[Any, Any], run: TaskRun, state: State[Any]) -> bool:
    """Return True if a failed task may succeed when it is called again unchanged; log why."""
    error = state.result(raise_on_failure=False)
    if not isinstance(error, TransientError):
        return False
    logger.warning("%s, try %d of %d: %s", task.name, run.run_count, task.retries + 1, error.what)
    return True


DEBUG_VARIABLE = "QWEN3FT_DEBUG"

RUN_LOGGERS = ("prefect.flow_runs", "prefect.task_runs")
"""Prefect's loggers, which log errors with their causes."""


def hide_known_tracebacks() -> None:
    """Log a `FinetuneError` without its traceback, unless QWEN3FT_DEBUG is set."""
    if not os.environ.get(DEBUG_VARIABLE):
        for name in RUN_LOGGERS:
            logging.getLogger(name).addFilter(_without_known_traceback)  # no effect the second time


def _without_known_traceback(record: logging.LogRecord) -> bool:
    if record.exc_info and isinstance(record.exc_info[1], FinetuneError):
        # the state that Prefect logs next has the message
        record.msg, record.args = "ended by %s", (type(record.exc_info[1]).__name__,)
        record.exc_info = None
    return True
