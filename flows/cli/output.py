"""The two streams of a command: results on standard output, remarks on standard error.

All that a command prints goes through here: nothing in it steers the terminal, and secrets are
masked, except in what a model answers to the person who asks it.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from functools import cache
from typing import TYPE_CHECKING, Any

import typer

from qwen3ft.logs import mask_secrets, mask_values
from qwen3ft.plain_text import escaped, escaped_in_json

if TYPE_CHECKING:
    from rich.console import Console


def open_console(*, stderr: bool = False, **options: Any) -> Console:
    """Open a console for results, or for what accompanies JSON and for errors.

    Args:
        stderr: Write to standard error.
        options: As for rich's console.
    """
    return _console_class()(stderr=stderr, highlight=False, emoji=False, markup=False, **options)


@cache
def _console_class() -> type[Console]:
    from rich.console import Console, ConsoleOptions, RenderableType
    from rich.segment import Segment

    class PlainConsole(Console):
        """Masks lines, and escapes what steers a terminal in every text, also in a table."""

        def print(self, *objects: Any, **options: Any) -> None:
            lines = (mask_secrets(each) if isinstance(each, str) else each for each in objects)
            super().print(*lines, **options)

        def render(
            self, renderable: RenderableType, options: ConsoleOptions | None = None
        ) -> Iterable[Segment]:
            for segment in super().render(renderable, options):
                is_own = bool(segment.control)  # rich's, to redraw a line
                yield segment if is_own else segment._replace(text=escaped(segment.text))

    return PlainConsole


def say(line: str) -> None:
    """Print a line for a person on standard error; a program may be reading standard output."""
    typer.echo(escaped(mask_secrets(line)), err=True)


def print_piece(text: str, *, err: bool) -> None:
    """Print a piece of an answer as it comes."""
    typer.echo(escaped(text), nl=False, err=err)


def print_json(value: Any) -> None:
    """Print the one JSON object of a command with --json."""
    typer.echo(escaped_in_json(json.dumps(mask_values(value), ensure_ascii=False, indent=2)))
