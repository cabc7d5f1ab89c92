"""Figure of the scores of base, champion and candidate, on one axis, with their intervals."""

from __future__ import annotations

from pathlib import Path
from typing import Any
from uuid import NAMESPACE_URL, uuid5

from qwen3ft.evaluation.wording import METRIC_NAMES
from qwen3ft.records.evaluation import InferenceReport, MetricName
from qwen3ft.report.figures import new_figure

SHARES: tuple[MetricName, ...] = ("exact_match", "token_f1")
COLOURS = {"base": "#9aa5b1", "champion": "#3b7dd8", "candidate": "#e8833a"}
BAR_WIDTH = 0.26


def scores_figure(report: InferenceReport) -> Any:
    """Draw one group of bars for each score that is a share, one bar for each model.

    Returns:
        A `matplotlib.figure.Figure`.
    """
    figure = new_figure(8, 4.5)
    axes = figure.add_subplot()
    for place, score in enumerate(report.scores):
        shift = (place - (len(report.scores) - 1) / 2) * BAR_WIDTH
        heights = [100 * float(getattr(score, name)) for name in SHARES]
        name = f"champion v{report.champion_version}" if score.label == "champion" else score.label
        spots = [group + shift for group in range(len(SHARES))]
        bars = axes.bar(spots, heights, BAR_WIDTH, label=name, color=COLOURS[score.label])
        axes.bar_label(bars, fmt="%.1f", padding=3)
        if score.exact_match_interval is not None:
            low, high = (100 * edge for edge in score.exact_match_interval)
            reach = [[max(0.0, heights[0] - low)], [max(0.0, high - heights[0])]]
            axes.errorbar(spots[:1], heights[:1], yerr=reach, color="black", capsize=4)
    questions = max((score.rows for score in report.scores), default=0)
    axes.set(title=f"Scores on {questions:,} held-out questions", ylabel="%", ylim=(0, 108))
    axes.set_xticks(range(len(SHARES)), [METRIC_NAMES[name] for name in SHARES])
    axes.grid(axis="y", alpha=0.3)
    axes.legend()
    return figure


def write_logged_image(figure: Any, folder: Path, key: str, run: str) -> None:
    """Write a figure as MLflow's `log_image` does, which a run's page shows among its charts.

    The names are the same each time, so that an image that is sent again replaces itself.

    Args:
        figure: A `matplotlib.figure.Figure`.
        folder: Existing folder for the image and its small version.
        key: Title of the image; letters, digits and underscores.
        run: Id of the run.
    """
    name = f"{key}+step+0+timestamp+0+{uuid5(NAMESPACE_URL, f'{run}/{key}')}"
    figure.savefig(folder / f"{name}.png", format="png", dpi=120)
    figure.savefig(folder / f"{name}+compressed.webp", format="webp", dpi=60)
