"""Scores, losses and intervals as people read them."""

from __future__ import annotations

from qwen3ft.result_records import Comparison, MetricName

METRIC_NAMES: dict[MetricName, str] = {
    "exact_match": "exact match",
    "token_f1": "token F1",
    "chrf": "chrF",
    "answer_loss": "answer loss",
}


def show_score(metric: str, value: float | None) -> str:
    """A score in per cent, a loss in nats per token."""
    if value is None:
        return "not finite"
    return f"{value:.4g}" if metric.endswith("loss") else f"{value:.1%}"


def interval_text(comparison: Comparison) -> str:
    """`+12.0 (+9.1 to +15.2) points`, or nats."""
    is_loss = comparison.metric == "answer_loss"
    scale, digits, unit = (1.0, 3, "nats") if is_loss else (100.0, 1, "points")
    gain, low, high = (
        f"{value * scale:+.{digits}f}"
        for value in (comparison.gain, comparison.low, comparison.high)
    )
    return f"{gain} ({low} to {high}) {unit}"
