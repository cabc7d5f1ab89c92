"""The two streams of a command: results on standard output, remarks on standard error."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import typer

if TYPE_CHECKING:
    from rich.console import Console


def open_console(*, stderr: bool = False) -> Console:
    """Open a console for results, or for what accompanies JSON and for errors."""
    from rich.console import Console

    return Console(stderr=stderr, highlight=False, emoji=False)  # paths may hold :train:


def say(line: str) -> None:
    """Print a line for a person on standard error; a program may be reading standard output."""
    typer.echo(line, err=True)


def print_json(value: Any) -> None:
    """Print the one JSON object of a command with --json."""
    typer.echo(json.dumps(value, ensure_ascii=False, indent=2))
