"""Scores, losses, intervals and times as people read them."""

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


def format_seconds(seconds: float) -> str:
    """`0.4 s`, `31 s`, `12 min 5 s`, `3 h 20 min`."""
    if seconds < 10:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    if minutes == 0:
        return f"{rest} s"
    hours, minutes_left = divmod(minutes, 60)
    return f"{hours} h {minutes_left} min" if hours else f"{minutes} min {rest} s"
