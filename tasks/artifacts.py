"""Artifacts on a run's page in Prefect, each with a description.

The key of the run card is the run's own, so Prefect's list of artifacts has one line per run. All
other keys are the same every night, with every night's version behind them. If the server cannot be
reached the artifact is skipped; all of it is in the run's folder and in MLflow.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import httpx
from prefect.artifacts import (
    create_link_artifact,
    create_markdown_artifact,
    create_table_artifact,
)
from prefect.exceptions import PrefectException

from qwen3ft.logs import get_logger, mask_secrets
from qwen3ft.text.plain import escaped

logger = get_logger("artifacts")

RUN_CARD, DATA, PLAN, PREFLIGHT, ATTEMPTS = "run-card", "data", "plan", "preflight", "attempts"
MLFLOW_RUN = "mlflow-run"

NOT_SHOWN = (httpx.HTTPError, PrefectException, OSError)
"""Exceptions of Prefect's client if its server is down, slow or broken."""


def show_markdown(key: str, markdown: str, description: str) -> None:
    """Show a page of text."""
    markdown, description = _plain(markdown), _plain(description)
    _show(key, lambda: create_markdown_artifact(markdown, key=key, description=description))


def show_table(key: str, rows: Sequence[dict[str, Any]], description: str) -> None:
    """Show a table; the keys of the first row are its columns."""
    plain = [{name: _plain_value(value) for name, value in row.items()} for row in rows]
    description = _plain(description)
    _show(key, lambda: create_table_artifact(plain, key=key, description=description))


def show_link(key: str, link: str, text: str) -> None:
    """Show a link, which `text` describes."""
    _show(key, lambda: create_link_artifact(link, text, key=key, description=text))


def _plain(text: str) -> str:
    """Return `text` masked and fit to be shown."""
    return escaped(mask_secrets(text))


def _plain_value(value: Any) -> Any:
    return _plain(value) if isinstance(value, str) else value


def _show(key: str, create: Callable[[], object]) -> None:
    try:
        create()
    except NOT_SHOWN as error:
        logger.warning("%s is not shown in Prefect: %s: %s", key, type(error).__name__, error)
