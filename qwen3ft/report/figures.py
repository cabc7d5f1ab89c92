"""Figures of a run for MLflow: its loss, the lengths of its rows, its memory by attempt."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import datetime, timedelta
from itertools import chain
from pathlib import Path
from typing import Any

from pydantic import BaseModel

from qwen3ft.records.base import Record
from qwen3ft.records.plan import MemoryPart
from qwen3ft.records.training import TrainingMetrics
from qwen3ft.units import gb

DRAWN_PAUSE_SECONDS = 60.0
"""Longest pause between attempts that is drawn; a run may be resumed days later."""

NAMES_APART_SHARE = 0.04
"""Smallest distance of two attempts' names, as a share of the axis."""

MOST_BARS, PARTS_NAMED = 6, 9


def loss_figure(lines: Sequence[TrainingMetrics]) -> Any:
    """Draw training and held-out loss (nats per trained token) over optimizer steps.

    Returns:
        A `matplotlib.figure.Figure`; `write_png` turns it into a file.
    """
    figure, axes = _canvas("Loss", "optimizer step", "loss per trained token (nats)")
    training = [line for line in lines if line.loss is not None]
    held_out = [line for line in lines if line.held_out_loss is not None]
    axes.plot([line.step for line in training], [line.loss for line in training], label="training")
    axes.plot(
        [line.step for line in held_out],
        [line.held_out_loss for line in held_out],
        marker="o",
        label="held out",
    )
    axes.legend()
    return figure


def lengths_figure(histogram: Sequence[tuple[int, int]], limit_tokens: int) -> Any:
    """Draw a histogram of row lengths, with the limit.

    Args:
        histogram: (upper edge in tokens, rows) of each bin; at least one.
        limit_tokens: `max_sequence_length`.
    """
    figure, axes = _canvas("Lengths of the rows", "tokens", "rows")
    edges = [edge for edge, _ in histogram]
    width = edges[0]
    axes.bar([edge - width / 2 for edge in edges], [rows for _, rows in histogram], 0.9 * width)
    axes.axvline(limit_tokens, color="tab:red", label=f"max_sequence_length {limit_tokens}")
    axes.legend()
    return figure


def write_png(figure: Any, path: Path) -> Path:
    """Render `figure` to `path` and return the path."""
    figure.savefig(path, format="png", dpi=120)
    return path


def new_figure(width_inches: float, height_inches: float) -> Any:
    """Return an empty figure that can be rendered to a file."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    # not pyplot: its global state is not thread-safe, and it looks for a display
    figure = Figure(figsize=(width_inches, height_inches), layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def _canvas(title: str, x_label: str, y_label: str) -> tuple[Any, Any]:
    figure = new_figure(10, 5)
    axes = figure.add_subplot()
    axes.set(title=title, xlabel=x_label, ylabel=y_label)
    axes.grid(visible=True, alpha=0.3)
    return figure, axes


class MemorySample(BaseModel):
    """One line of memory.jsonl: a `MemoryStatus` with step and time; other keys are ignored."""

    step: int
    timestamp: datetime
    allocated_gb: float
    cached_gb: float
    available_gb: float
    beside_gb: float = 0.0

    @property
    def process_gb(self) -> float:
        """Memory of the whole process: the allocator's and the rest."""
        return self.cached_gb + self.beside_gb


class AttemptMemory(Record):
    """One attempt in the figure of memory."""

    number: int
    started: datetime
    ended: datetime | None = None
    measured_seconds: float | None = None
    """Duration by a clock that nobody sets; None if unknown."""
    failure: str | None = None
    budget_gb: float | None = None
    predicted: tuple[MemoryPart, ...] = ()
    samples: tuple[MemorySample, ...] = ()

    @property
    def predicted_gb(self) -> float:
        """Sum of the predicted parts."""
        return gb(sum(part.bytes for part in self.predicted))

    @property
    def seconds(self) -> float:
        """Duration up to the attempt's end or its last memory reading."""
        if self.measured_seconds is not None:
            return self.measured_seconds
        end = max([self.ended or self.started, *(sample.timestamp for sample in self.samples)])
        return max(0.0, (end - self.started).total_seconds())

    def minutes(self, start: float) -> list[float]:
        """Return the times of the samples on an axis where the attempt starts at `start`."""
        since = [(sample.timestamp - self.started).total_seconds() for sample in self.samples]
        # the clock may have been set meanwhile
        return [start + min(max(0.0, seconds), self.seconds) / 60 for seconds in since]


def memory_figure(attempts: Sequence[AttemptMemory]) -> Any:
    """Draw the memory of `attempts`, in order; at least one.

    Returns:
        A `matplotlib.figure.Figure`; `write_png` turns it into a file.
    """
    figure = new_figure(12, 6)
    grid = figure.add_gridspec(1, 2, width_ratios=(3, 1.25))
    curves = figure.add_subplot(grid[0])
    bars = figure.add_subplot(grid[1], sharey=curves)
    _draw_curves(curves, attempts)
    _name_attempts(curves, attempts)
    _draw_bars(bars, attempts)
    if (budget_gb := _last_budget(attempts)) is not None:
        for axes in (curves, bars):
            axes.axhline(budget_gb, color="tab:red", label=f"budget {budget_gb:.2f} GB")
    curves.set(
        xlabel="minutes (pauses between attempts cut to 1)",
        ylabel="GB (2**30 bytes)",
        ylim=(0, 1.1 * _highest_gb(attempts)),
    )
    curves.set_xlim(left=0)
    handles, labels = curves.get_legend_handles_labels()
    if by_label := dict(zip(labels, handles, strict=True)):  # attempts share their labels
        curves.legend(by_label.values(), by_label, loc="lower right", framealpha=0.9)
    bars.set_title("predicted peak")
    return figure


def attempt_minutes(attempts: Sequence[AttemptMemory]) -> list[tuple[float, float]]:
    """Return (start, end) of each attempt in minutes, with long pauses cut."""
    spans: list[tuple[float, float]] = []
    at_seconds, before = 0.0, None
    for attempt in attempts:
        if before is not None:
            pause = (attempt.started - before).total_seconds()
            at_seconds += min(max(0.0, pause), DRAWN_PAUSE_SECONDS)
        spans.append((at_seconds / 60, (at_seconds + attempt.seconds) / 60))
        at_seconds += attempt.seconds
        before = attempt.started + timedelta(seconds=attempt.seconds)
    return spans


def _draw_curves(axes: Any, attempts: Sequence[AttemptMemory]) -> None:
    for attempt, (start, end) in zip(attempts, attempt_minutes(attempts), strict=True):
        minutes = attempt.minutes(start)
        for label, colour, values in (
            ("whole process", "tab:gray", [s.process_gb for s in attempt.samples]),
            ("held by the allocator", "tab:blue", [s.cached_gb for s in attempt.samples]),
            ("in use", "tab:orange", [s.allocated_gb for s in attempt.samples]),
        ):
            if values:
                axes.plot(minutes, values, color=colour, label=label)
        colour = "tab:red" if attempt.failure else "tab:green"
        axes.axvspan(start, end, color=colour, alpha=0.06, linewidth=0)
        axes.axvline(start, color="black", linestyle=":", linewidth=0.8)
        if attempt.ended is not None:
            axes.axvline(end, color=colour, linestyle="-.", linewidth=1)
        if attempt.predicted:
            level = attempt.predicted_gb
            axes.hlines(level, start, end, "black", "dashed", label="predicted peak")
    axes.grid(visible=True, alpha=0.3)


def _name_attempts(axes: Any, attempts: Sequence[AttemptMemory]) -> None:
    """Write number and outcome above the middle of each attempt, right of the one before."""
    spans = attempt_minutes(attempts)
    apart = NAMES_APART_SHARE * max(spans[-1][1], 1e-9)
    at = -apart
    for attempt, (start, end) in zip(attempts, spans, strict=True):
        at = max((start + end) / 2, at + apart)
        outcome = attempt.failure or ("completed" if attempt.ended else "running")
        axes.annotate(
            f"{attempt.number}: {outcome}",
            (at, 1.01),
            xycoords=("data", "axes fraction"),
            rotation=30,
            ha="left",
            va="bottom",
            rotation_mode="anchor",
            fontsize=9,
            color="tab:red" if attempt.failure else "tab:green",
            annotation_clip=False,
        )


def _draw_bars(axes: Any, attempts: Sequence[AttemptMemory]) -> None:
    """Draw one stack for each different prediction; the last ones if there are many."""
    from matplotlib import colormaps

    plans: dict[tuple[MemoryPart, ...], list[int]] = {}
    for attempt in attempts:
        if attempt.predicted:
            plans.setdefault(attempt.predicted, []).append(attempt.number)
    drawn = list(plans.items())[-MOST_BARS:]
    order = _parts_by_size([parts for parts, _ in drawn])
    palette = colormaps["tab20"]
    bottoms = [0.0] * len(drawn)
    groups = {name: [name] for name in order[:PARTS_NAMED]}
    groups |= {"other parts": order[PARTS_NAMED:]} if order[PARTS_NAMED:] else {}
    for index, (label, names) in enumerate(groups.items()):
        heights = [
            gb(sum(part.bytes for part in parts if part.name in names)) for parts, _ in drawn
        ]
        # tab20 holds pairs of dark and light: all dark ones first
        colour = palette(2 * index % 20 + (2 * index) // 20)
        axes.bar(range(len(drawn)), heights, 0.6, bottom=bottoms, label=label, color=colour)
        bottoms = [bottom + height for bottom, height in zip(bottoms, heights, strict=True)]
    for index, total_gb in enumerate(bottoms):
        axes.annotate(f"{total_gb:.2f}", (index, total_gb), ha="center", va="bottom", fontsize=9)
    axes.set_xticks(range(len(drawn)), [_attempt_names(numbers) for _, numbers in drawn])
    axes.set_xlim(-0.8, max(len(drawn), 1) - 0.2)
    axes.tick_params(labelleft=False)
    axes.grid(visible=True, alpha=0.3, axis="y")
    handles, labels = axes.get_legend_handles_labels()
    if handles:
        axes.legend(
            handles[::-1], labels[::-1], fontsize=8, loc="upper left", bbox_to_anchor=(1.0, 1.0)
        )


def _parts_by_size(plans: Sequence[Sequence[MemoryPart]]) -> list[str]:
    largest: dict[str, int] = {}
    for part in chain.from_iterable(plans):
        largest[part.name] = max(largest.get(part.name, 0), part.bytes)
    return sorted((name for name in largest if largest[name] > 0), key=lambda n: -largest[n])


def _attempt_names(numbers: Sequence[int]) -> str:
    first, *others = numbers
    return f"attempt\n{first} to {others[-1]}" if others else f"attempt\n{first}"


def _last_budget(attempts: Sequence[AttemptMemory]) -> float | None:
    return next((a.budget_gb for a in reversed(attempts) if a.budget_gb is not None), None)


def _highest_gb(attempts: Sequence[AttemptMemory]) -> float:
    used = (sample.process_gb for attempt in attempts for sample in attempt.samples)
    predicted = (attempt.predicted_gb for attempt in attempts)
    return max(*used, *predicted, _last_budget(attempts) or 0.0, 1e-3)
