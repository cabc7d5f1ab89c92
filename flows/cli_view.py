"""How the `qwen3ft` command looks: rich on a terminal, plain lines everywhere else.

Rendering only: nothing here reads files, asks servers or decides.
"""

from __future__ import annotations

import json
import time
from collections.abc import Iterable, Mapping
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self

import typer
from rich.console import Console, Group, RenderableType
from rich.panel import Panel
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn
from rich.progress import Progress as ProgressBar
from rich.table import Table
from rich.text import Text

from qwen3ft.evaluation.wording import format_seconds
from qwen3ft.records.machine import EnvironmentReport
from qwen3ft.records.run_card import RunCard
from qwen3ft.units import size_text

if TYPE_CHECKING:
    from deployments.stack import StackStatus
    from flows.follow import Progress, StateChange
    from qwen3ft.errors import FinetuneError

PLAIN_SECONDS = 5.0
"""Time between two progress lines where there is no terminal to redraw."""

WAITING = {
    "AwaitingConcurrencySlot": "another run is in progress",
    "Late": "no worker has taken it yet",
}
QUIET_STATES = ("Running", "Completed", "Cached")
STYLES = {
    "Completed": "green",
    "Cached": "green",
    "Running": "cyan",
    "Failed": "red",
    "Crashed": "red",
    "TimedOut": "red",
    "Cancelled": "yellow",
}


def open_console(*, stderr: bool = False) -> Console:
    """Standard output for results, standard error for what accompanies JSON, and for errors."""
    return Console(stderr=stderr, highlight=False, emoji=False)  # paths may hold :train:


def say(line: str) -> None:
    """A line for a person; on standard error, since a program may read standard output."""
    typer.echo(line, err=True)


def print_json(value: Any) -> None:
    """The one JSON object of a command with --json."""
    typer.echo(json.dumps(value, ensure_ascii=False, indent=2))


class RunView:
    """Shows a run as it happens. Use as a context manager: it may own the terminal's last line."""

    def __init__(self, console: Console) -> None:
        self.console = console
        self._last_plain_seconds = 0.0
        self._bar = ProgressBar(
            TextColumn("  {task.description:14}"),
            BarColumn(bar_width=24),
            MofNCompleteColumn(),
            TextColumn("{task.fields[numbers]}"),
            TimeRemainingColumn(),
            console=console,
            transient=True,
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
        """One line: what entered which state, and how long it took."""
        line = Text(f"  {change.name:14}  ")
        line.append(f"{change.state:9}", style=STYLES.get(change.state, ""))
        if change.seconds is not None and change.state != "Cached":
            line.append(f"  {format_seconds(change.seconds):>7}")
        # the run's own message is shown in full when it is over
        told = change.message if change.name != "run" else WAITING.get(change.state, "")
        if told and change.state not in QUIET_STATES:
            line.append(f"  {told.splitlines()[0]}")
        if change.seconds is not None:
            self._bar.update(self._task, visible=False)
        self.console.print(line, soft_wrap=True)

    def progress(self, progress: Progress) -> None:
        """Redraw the bar, or print a line if the last one is some seconds old."""
        metrics, name = progress.metrics, f"train-{progress.attempt}"
        numbers = f"loss {metrics.loss:.3f}" if metrics.loss is not None else ""
        if metrics.tokens_per_second:
            numbers += f"  {metrics.tokens_per_second:,.0f} tok/s"
        numbers += f"  {metrics.memory_usage.allocated_gb:.2f} GB"
        self._bar.update(
            self._task,
            description=name,
            completed=metrics.step,
            total=progress.total_steps,
            numbers=numbers,
            visible=True,
        )
        now = time.monotonic()
        if not self.console.is_terminal and now - self._last_plain_seconds >= PLAIN_SECONDS:
            self._last_plain_seconds = now
            steps = f"step {metrics.step}/{progress.total_steps or '?'}"
            self.console.print(f"  {name:14}  {steps}  {numbers}", soft_wrap=True)


def show_card(console: Console, card: RunCard) -> None:
    """Show the result of a run on one screen."""
    from qwen3ft.report.facts import card_facts

    rows = {}
    for fact in card_facts(card):
        rows[fact.label] = fact.text
        if fact.label == "exact match":
            rows |= {
                f"  {split}": f"{base:.1%} → {tuned:.1%} of {count}"
                for split, (base, tuned, count) in card.scores_by_split.items()
            }
    stages = card.seconds_by_stage.items()
    rows["stages"] = "  ".join(f"{name} {format_seconds(s)}" for name, s in stages)
    rows["verdict"] = card.verdict
    rows |= {"note" if n == 1 else f"note {n}": note for n, note in enumerate(card.notes, 1)}
    rows["Prefect"] = card.prefect_url or "recorded without a server: no page"
    rows["MLflow"] = card.mlflow_url or "recorded without a server: no page"
    # ASCII arrows: a log file or a remote terminal may not be UTF-8
    rows = {name: value.replace("→", "->") for name, value in rows.items() if value}
    show_sections(console, card.title, {"": rows})


def show_status(console: Console, status: StackStatus) -> None:
    """One line per process, then the deployment."""
    rows: dict[str, str] = {
        service.name: f"{'up' if service.healthy else 'down'}"
        + (f"  pid {service.pid}" if service.pid else "")
        + (f"  {service.url}" if service.url and service.healthy else f"  {service.log}")
        for service in status.services
    }
    registered = "registered" if status.deployment_registered else "not registered"
    schedule = "nightly schedule on" if status.schedule_active else "nightly schedule off"
    rows[status.deployment] = f"{registered}, {schedule}" if status.prefect_url else "unknown"
    show_sections(console, status.root, {"": rows})


def show_report(console: Console, report: EnvironmentReport, problems: Iterable[str]) -> None:
    """What the machine is, and what it lacks."""
    rows = {
        "python": f"{report.python_version}  {report.python_executable}",
        "platform": f"{report.platform}, {report.cpu_count} CPUs",
        "packages": ", ".join(f"{name} {version}" for name, version in report.versions.items()),
        "memory": f"{size_text(report.host_free_bytes, 1)} free "
        f"of {size_text(report.host_total_bytes, 1)}",
        "disk": f"{size_text(report.disk_free_bytes, 1)} free",
    }
    for gpu in report.gpus:
        rows[f"GPU {gpu.index}"] = (
            f"{gpu.name}, {size_text(gpu.free_bytes, 1)} free of {size_text(gpu.total_bytes, 1)}, "
            f"driver {gpu.driver_version}"
        )
    if not report.gpus:
        rows["GPU"] = (
            "none with CUDA: runs train on the CPU, which is meant for the embedded model alone"
        )
    rows |= {f"problem {n}": problem for n, problem in enumerate(problems, 1)}
    show_sections(console, "This machine", {"": rows})


def show_error(console: Console, error: FinetuneError) -> None:
    """What, why, next: never a traceback."""
    for label, text, style in (
        ("What", error.what, "bold red"),
        ("Why", error.why, ""),
        ("Next", error.next_command, "bold"),
    ):
        if text:
            console.print(Text(f"{label}:  ".ljust(7)) + Text(text, style=style), soft_wrap=True)


def show_sections(console: Console, title: str, sections: Mapping[str, Mapping[str, str]]) -> None:
    """Sections of names and values: a panel on a terminal, plain lines elsewhere."""
    if not console.is_terminal:
        for heading, rows in sections.items():
            console.print(heading or title, markup=False)
            for name, value in rows.items():
                console.print(f"  {name:14} {value}", soft_wrap=True, markup=False)
        return
    parts: list[RenderableType] = []
    for heading, rows in sections.items():
        table = Table.grid(padding=(0, 2))
        table.add_column(no_wrap=True, style="dim")
        table.add_column(overflow="fold")
        for name, value in rows.items():
            table.add_row(Text(name), Text(value))
        parts += [Text(f"\n{heading}"), table] if heading else [table]
    console.print(Panel(Group(*parts), title=title, title_align="left", expand=False))
