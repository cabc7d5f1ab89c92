"""The two streams of a command: results on standard output, remarks on standard error.

All that a command prints goes through here: nothing in it steers the terminal, and secrets are
masked, also in what a model answers.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable
from functools import cache
from typing import TYPE_CHECKING, Any

import typer

from qwen3ft.logs import MASK, mask_secrets, mask_values, secret_spans
from qwen3ft.text.plain import escaped, escaped_in_json

if TYPE_CHECKING:
    from rich.console import Console

# The end of a text that may be part of a secret, by what the patterns of `logs` consist of: a key
# is a run of such characters, a password may have others, and a private key has several lines.
_MAY_GO_ON = re.compile(
    r"-----BEGIN [A-Z ]*(?:-{0,5}\Z|PRIVATE KEY(?: BLOCK)?-----(?:(?!-----END [A-Z ]+-----).)*+\Z)"
    r"|[A-Za-z0-9+.-]*+://[^/\s]*+\Z"
    r"|[Bb]earer(?: [A-Za-z0-9._~+/-]*+=*+)?\Z"
    r"|[A-Za-z0-9._~+/=:@-]++\Z",
    re.DOTALL,
)


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


class AnswerPrinter:
    """Prints an answer as it comes, except the end of it that may be part of a secret."""

    def __init__(self) -> None:
        self._held, self._err = "", False

    def add(self, text: str, *, err: bool) -> None:
        """Print what is sure by now."""
        if err != self._err:
            self.end()
        self._err, self._held = err, self._held + text
        may_go_on = _MAY_GO_ON.search(self._held)
        self._print(may_go_on.start() if may_go_on else len(self._held))

    def end(self) -> None:
        """Print the rest."""
        self._print(len(self._held))

    def _print(self, size: int) -> None:
        """Print so many characters of what is held, and the rest of a secret that is cut there."""
        shown, printed = "", 0
        for start, end in secret_spans(self._held):  # found with what stands around them
            if start < size:
                shown += self._held[printed:start] + MASK
                printed, size = end, max(size, end)
        shown += self._held[printed:size]
        self._held = self._held[size:]
        typer.echo(escaped(shown), nl=False, err=self._err)


def print_json(value: Any) -> None:
    """Print the one JSON object of a command with --json."""
    typer.echo(escaped_in_json(json.dumps(mask_values(value), ensure_ascii=False, indent=2)))
