"""Figure of the scores of base, champion and candidate, on one axis, with their intervals."""

from __future__ import annotations

from typing import Any

from qwen3ft.evaluation.wording import METRIC_NAMES
from qwen3ft.records.evaluation import InferenceReport, MetricName
from qwen3ft.report.figures import new_figure

SHARES: tuple[MetricName, ...] = ("exact_match", "token_f1")
COLOURS = {"base": "#9aa5b1", "champion": "#3b7dd8", "candidate": "#e8833a"}
BAR_WIDTH = 0.26

SCORES_PICTURE = "figures/scores.png"
"""Path of the picture among a run's artifacts in MLflow."""


def scores_figure(report: InferenceReport) -> Any:
    """Draw one group of bars for each score that is a share, one bar for each model.

    Returns:
        A `matplotlib.figure.Figure`, narrow enough for MLflow's description of a run.
    """
    figure = new_figure(6, 3.4)
    axes = figure.add_subplot()
    for place, score in enumerate(report.scores):
        shift = (place - (len(report.scores) - 1) / 2) * BAR_WIDTH
        heights = [100 * float(getattr(score, name)) for name in SHARES]
        name = f"champion v{report.champion_version}" if score.label == "champion" else score.label
        spots = [group + shift for group in range(len(SHARES))]
        axes.bar(spots, heights, BAR_WIDTH, label=name, color=COLOURS[score.label])
        tops = list(heights)
        if score.exact_match_interval is not None:
            low, high = (100 * edge for edge in score.exact_match_interval)
            reach = [[max(0.0, heights[0] - low)], [max(0.0, high - heights[0])]]
            axes.errorbar(spots[:1], heights[:1], yerr=reach, color="black", capsize=4)
            tops[0] = max(high, heights[0])
        for spot, top, height in zip(spots, tops, heights, strict=True):
            axes.text(spot, top + 1, f"{height:.1f}", ha="center", va="bottom")
    questions = max((score.rows for score in report.scores), default=0)
    axes.set(title=f"Scores on {questions:,} held-out questions", ylabel="%", ylim=(0, 110))
    names = [METRIC_NAMES[name] for name in SHARES]
    if report.confidence is not None:
        names[0] += f" and its {report.confidence:.0%} interval"
    axes.set_xticks(range(len(SHARES)), names)
    axes.grid(axis="y", alpha=0.3)
    figure.legend(loc="outside lower center", ncols=len(report.scores))
    return figure
