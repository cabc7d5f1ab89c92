"""The pictures of a run: lengths of its rows, its loss curve, its memory beside the budget.

Drawn without a display and without pyplot's global state, so it is safe in any thread. What to draw
comes in as records; reading files is the caller's business.
"""

from __future__ import annotations

from collections.abc import Sequence
from datetime import datetime
from pathlib import Path
from typing import Any

from pydantic import BaseModel

from qwen3ft.records import TrainingMetrics


class MemorySample(BaseModel):
    """One line of memory.jsonl: a `MemoryStatus` with its step and time; other keys are ignored."""

    step: int
    timestamp: datetime
    allocated_gb: float
    cached_gb: float
    available_gb: float


def loss_figure(lines: Sequence[TrainingMetrics]) -> Any:
    """Training and held-out loss (nats per trained token) over optimizer steps.

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


def memory_figure(
    samples: Sequence[MemorySample], budget_gb: float | None, predicted_gb: float | None
) -> Any:
    """Memory in use and held by the allocator over time, with the budget and the predicted peak.

    Args:
        samples: At least one; times are shown as minutes since the first.
        budget_gb: Drawn as a line (2**30 bytes), if known.
        predicted_gb: Likewise, the peak that the plan predicted.
    """
    figure, axes = _canvas("Memory", "minutes", "GB (2**30 bytes)")
    minutes = [(sample.timestamp - samples[0].timestamp).total_seconds() / 60 for sample in samples]
    axes.plot(minutes, [sample.cached_gb for sample in samples], label="held by the allocator")
    axes.plot(minutes, [sample.allocated_gb for sample in samples], label="in use")
    if budget_gb is not None:
        axes.axhline(budget_gb, color="tab:red", label=f"budget {budget_gb:.2f} GB")
    if predicted_gb is not None:
        axes.axhline(
            predicted_gb, color="tab:gray", linestyle="--", label=f"predicted {predicted_gb:.2f} GB"
        )
    axes.set_ylim(bottom=0)
    axes.legend()
    return figure


def lengths_figure(histogram: Sequence[tuple[int, int]], limit_tokens: int) -> Any:
    """Rows by length, with the longest length that is trained.

    Args:
        histogram: (upper edge in tokens, rows) of each bin, at least one.
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
    """Render `figure` to `path`."""
    figure.savefig(path, format="png", dpi=120)
    return path


def _canvas(title: str, x_label: str, y_label: str) -> tuple[Any, Any]:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 5), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    axes.set(title=title, xlabel=x_label, ylabel=y_label)
    axes.grid(visible=True, alpha=0.3)
    return figure, axes
