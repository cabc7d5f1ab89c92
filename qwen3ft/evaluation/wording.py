"""Format scores, losses, intervals, durations and the judge's counts for people."""

from __future__ import annotations

from qwen3ft.records.evaluation import MODELS, Comparison, InferenceReport, JudgeReport, MetricName
from qwen3ft.units import gb, size_text

METRIC_NAMES: dict[MetricName, str] = {
    "exact_match": "exact match",
    "token_f1": "token F1",
    "chrf": "chrF",
    "answer_loss": "answer loss",
}

OTHER_SCORES = {
    "perplexity": "perplexity of the right answers",
    "ability_loss": "loss on the ability set",
}
"""Fields of `ModelScore` that the card shows without a gain."""


def score_text(metric: str, value: float | None) -> str:
    """Format a share in per cent, a loss (nats per token) or perplexity with four digits."""
    if value is None:
        return "not finite"
    is_share = metric not in ("loss", "answer_loss", *OTHER_SCORES)
    return f"{value:.1%}" if is_share else f"{value:.4g}"


def interval_text(comparison: Comparison) -> str:
    """Format a gain as `+12.0 (+9.1 to +15.2) points`, or in nats."""
    is_loss = comparison.metric == "answer_loss"
    scale, digits, unit = (1.0, 3, "nats") if is_loss else (100.0, 1, "points")
    gain, low, high = (
        f"{value * scale:+.{digits}f}"
        for value in (comparison.gain, comparison.low, comparison.high)
    )
    return f"{gain} ({low} to {high}) {unit}"


def judge_text(judge: JudgeReport) -> str:
    """Format the counts: `better in 31, worse in 9, tie in 10 of 50 (62%, 48% to 74%) ...`.

    Empty if nothing was judged.
    """
    if not judge.judged:
        return ""
    counts = f"better in {judge.wins}, worse in {judge.losses}, tie in {judge.ties}"
    share = f"({judge.win_share:.0%}, {judge.low:.0%} to {judge.high:.0%})"
    return f"{counts} of {judge.judged} {share}, against the {judge.rival}"


def judge_note(judge: JudgeReport) -> str:
    """Return one sentence about the questions without a verdict; '' if there are none."""
    missing = judge.rows - judge.judged - judge.unreadable
    parts = []
    if judge.unreadable:
        parts.append(f"gave no verdict on {judge.unreadable:,}")
    if missing:
        parts.append(f"left out {missing:,}: {judge.problem}")
    of = f"Of {judge.rows:,} questions the judge {judge.model}"
    return f"{of} {' and '.join(parts)}." if parts else ""


def format_seconds(seconds: float) -> str:
    """Format a duration: `0.4 s`, `31 s`, `12 min 5 s`, `3 h 20 min`."""
    if seconds < 10:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    if minutes == 0:
        return f"{rest} s"
    hours, minutes_left = divmod(minutes, 60)
    return f"{hours} h {minutes_left} min" if hours else f"{minutes} min {rest} s"


def answered_by_text(report: InferenceReport) -> str:
    """Return what answered, with its time and peak beside those predicted."""
    if not report.answer_seconds:
        return report.answered_by
    seconds = f"{report.answer_seconds:,.1f} s"
    if report.predicted_seconds is not None:
        seconds += f" ({report.predicted_seconds:,.1f} predicted)"
    peak = "" if report.peak_bytes is None else f", peak {size_text(report.peak_bytes)}"
    if peak and report.predicted_bytes is not None:
        peak += f" ({gb(report.predicted_bytes):.2f} predicted)"
    return f"{report.answered_by}; {seconds}{peak}"


def questions_text(report: InferenceReport) -> str:
    """Return how many questions it took; '' if all were asked."""
    if not report.stopped_early:
        return ""
    asked = max(score.rows for score in report.scores)
    return f"{asked:,} of {report.questions_planned:,}, then the verdict was clear: " + (
        report.stopped_early
    )


def thinking_text(report: InferenceReport) -> str:
    """Return how many answers of each model ended their thinking by themselves."""
    asked = report.thinking_asked
    if not asked:
        how = "not asked for, as in training: no held-out row has reasoning"
        return how if report.may_think else ""
    ended = (
        f"{label} {asked - report.thinking_cut[label]:,}"
        for label in MODELS
        if label in report.thinking_cut
    )
    return f"of {asked:,} answers, ended within its budget: {', '.join(ended)}"
