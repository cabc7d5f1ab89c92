"""Requests to the stack's Prefect server that have to succeed."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from deployments import services
from deployments.services import Layout
from qwen3ft.errors import EnvironmentNotReadyError


def send(
    layout: Layout, address: str, body: Mapping[str, Any] | None = None, method: str = "POST"
) -> Any:
    """What the server answers, parsed; None for an empty answer.

    Args:
        layout: Where the server is.
        address: What follows /api/ in its address.
        body: Sent as JSON.
        method: Of HTTP.

    Raises:
        EnvironmentNotReadyError: it does not answer, or refuses.
    """
    text = services.request_text(f"{layout.url('prefect')}/api/{address}", body, method)
    if text is None:
        raise EnvironmentNotReadyError(
            f"The Prefect server refused {method} /api/{address} or does not answer.",
            why="It may have been stopped meanwhile, or be another version.",
            next_command=f"tail -n 50 {layout.log('prefect')}",
        )
    return json.loads(text) if text else None
