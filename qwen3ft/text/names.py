"""Ids and names that become part of a path, a query or a page."""

from __future__ import annotations

from qwen3ft.text.plain import is_plain

_MOST_BYTES = 200
"""File systems take 255, and some names get an ending."""


def flaw_of_name(name: str) -> str:
    """Say why `name` cannot be the name of one folder and of a model in MLflow; '' if it can."""
    if not name or name != name.strip():
        return "it is empty, or begins or ends with a space"
    if name.startswith("."):
        return "it begins with a dot"
    if not is_plain(name) or not set("/\\:'\"").isdisjoint(name):
        return "it holds a slash, colon, quote or control character"
    if len(name.encode()) > _MOST_BYTES:
        return f"it is longer than {_MOST_BYTES} bytes"
    return ""
