"""States and progress of a run while it goes on: a bar on a terminal, plain lines elsewhere."""

from __future__ import annotations

import re
import time
from types import TracebackType
from typing import TYPE_CHECKING, Self

from rich.console import Console
from rich.progress import BarColumn, TextColumn
from rich.progress import Progress as ProgressBar
from rich.table import Column
from rich.text import Text

from qwen3ft.errors import error_kinds
from qwen3ft.evaluation.wording import format_seconds

if TYPE_CHECKING:
    from flows.cli.follow import StateChange
    from flows.cli.tails import AttemptProgress

_PLAIN_SECONDS = 10.0
"""Time between two lines of progress where there is no terminal to redraw."""

_WIDTH_FOR_BAR = 110
"""Characters of a terminal that has room for a bar beside the numbers, which matter more."""

_QUIET_STATES = ("Running", "Completed", "Cached")
_STYLES = {
    "COMPLETED": "green",
    "RUNNING": "cyan",
    "FAILED": "red",
    "CRASHED": "red",
    "CANCELLED": "yellow",
}


_PREFECT_WORDS = re.compile(
    r"\A(?:(?:Flow|Task) run encountered an exception:? ?)?"
    rf"(?:(?:{'|'.join(kind.__name__ for kind in error_kinds())}): )?"
)


def plain_message(message: str) -> str:
    """Return the message of a failed state without Prefect's words and the name of the class."""
    return _PREFECT_WORDS.sub("", message)


class RunView:
    """Display of a run in progress; a context manager, as it may own the terminal's last line."""

    def __init__(self, console: Console) -> None:
        self.console = console
        self._last_plain_seconds: float | None = None
        self._bar = ProgressBar(
            TextColumn("  {task.description:14}"),
            *([BarColumn(bar_width=24)] if console.width >= _WIDTH_FOR_BAR else []),
            TextColumn("{task.fields[numbers]}", table_column=Column(no_wrap=True)),
            console=console,
            transient=True,
            refresh_per_second=2,
            disable=not console.is_terminal,
        )
        self._task = self._bar.add_task("", total=None, visible=False, numbers="")

    def __enter__(self) -> Self:
        self._bar.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._bar.stop()

    def change(self, change: StateChange) -> None:
        """Print one line: what entered which state, and how long it took."""
        line = Text(f"  {change.name:14}  ")
        line.append(f"{change.state:9}", style=_STYLES.get(change.state_type, ""))
        if change.seconds is not None and change.state != "Cached":
            line.append(f"  {format_seconds(change.seconds):>7}")
        # the run's own message is shown in full when it is over
        is_end = change.name == "run" and change.seconds is not None
        message = "" if is_end or change.state in _QUIET_STATES else plain_message(change.message)
        if message:
            line.append(f"  {message.splitlines()[0]}")
        if change.seconds is not None:
            self.hide_progress()
        self.console.print(line, soft_wrap=True)

    def remark(self, text: str) -> None:
        """Print a line about the run."""
        self.console.print(f"  {'run':14}  {text}", soft_wrap=True)

    def hide_progress(self) -> None:
        """Remove the bar until there is progress again."""
        self._bar.update(self._task, visible=False)

    def progress(self, progress: AttemptProgress) -> None:
        """Redraw the bar; without a terminal, print a line if the last one is some seconds old."""
        metrics, name = progress.metrics, f"train-{progress.attempt}"
        parts = [f"step {metrics.step}/{progress.total_steps or '?'}"]
        parts.append(f"epoch {metrics.epoch:.1f}/{progress.num_epochs or '?'}")
        if metrics.loss is not None:
            parts.append(f"loss {metrics.loss:.3f}")
        if progress.seconds_left is not None:  # early stopping may end it sooner
            parts.append(f"at most {format_seconds(progress.seconds_left)} left")
        if metrics.tokens_per_second:
            parts.append(f"{metrics.tokens_per_second:,.0f} tok/s")
        parts.append(f"{metrics.memory_usage.allocated_gb:.2f} GB")
        numbers = "  ".join(parts)
        self._bar.update(
            self._task,
            description=name,
            completed=metrics.step,
            total=progress.total_steps,
            numbers=numbers,
            visible=True,
        )
        now = time.monotonic()
        if self.console.is_terminal:
            return
        if self._last_plain_seconds is None or now - self._last_plain_seconds >= _PLAIN_SECONDS:
            self._last_plain_seconds = now
            self.console.print(f"  {name:14}  {numbers}", soft_wrap=True)
