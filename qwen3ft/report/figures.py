"""The pictures of a run: lengths of its rows, its loss curve.

Drawn without a display and without pyplot's global state, so it is safe in any thread. What to draw
comes in as records; reading files is the caller's business.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from qwen3ft.records.plan import TrainingMetrics


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


def new_figure(width_inches: float, height_inches: float) -> Any:
    """An empty figure that can be rendered to a file."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width_inches, height_inches), layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def _canvas(title: str, x_label: str, y_label: str) -> tuple[Any, Any]:
    figure = new_figure(10, 5)
    axes = figure.add_subplot()
    axes.set(title=title, xlabel=x_label, ylabel=y_label)
    axes.grid(visible=True, alpha=0.3)
    return figure, axes
