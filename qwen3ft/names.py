"""Ids and names that become part of a path, a query or a page: checked where they enter."""

from __future__ import annotations

from qwen3ft.errors import ConfigError
from qwen3ft.plain_text import is_plain

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


def checked_name(name: str, of: str, next_command: str) -> str:
    """Return `name` if it can be the name of one folder and of a model in MLflow.

    Args:
        name: Id or name from outside: typed, a parameter of a run, or read from a file or server.
        of: Its meaning, for the message: 'run', 'registered model' ...
        next_command: Command that shows the names that exist.

    Raises:
        ConfigError: it could lead out of its folder, or change a query.
    """
    if flaw := flaw_of_name(name):
        shown = ascii(name[:60]) + ("..." if len(name) > 60 else "")
        raise ConfigError(
            f"{shown} cannot be the name of a {of}: {flaw}.",
            why="Names stand for one folder and are part of queries, so that nothing may lead out.",
            next_command=next_command,
        )
    return name
