"""Turn answers into scores, and the scores of two models into a gain with its interval.

The same answers always give the same numbers. `qwen3ft.evaluation.gate` decides what follows.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean, median

import numpy as np

from qwen3ft.evaluation.answer_loss import RowLoss, mean_loss
from qwen3ft.evaluation.answers import (
    MIN_NOT_EMPTY_SHARE,
    MIN_NOT_LOOPING_SHARE,
    Generated,
    Question,
    exact_match,
    group_by,
    share,
)
from qwen3ft.evaluation.form_checks import FORM_CHECKS, NO_LOOP, NOT_EMPTY, STOPS, check_form
from qwen3ft.evaluation.text_metrics import answer_tokens, chrf, token_f1
from qwen3ft.evaluation.wording import METRIC_NAMES
from qwen3ft.records.evaluation import (
    Comparison,
    MetricName,
    ModelLabel,
    ModelScore,
    RivalLabel,
    RowScore,
    SplitScore,
)

RESAMPLES = 9999

RESAMPLES_AT_A_TIME = 500
"""Batch of the bootstrap: 500 x 600 questions x 8 bytes is 2.4 MB."""

# fixed: the same answers must not be promoted tonight and kept tomorrow
BOOTSTRAP_SEED = 20260101

MIN_STOPPED_SHARE = 0.90

LONGEST_SHORT_ANSWER_TOKENS = 8
"""Longest answer, in words or Chinese characters, that is either right or wrong."""


@dataclass(frozen=True)
class Interval:
    """An estimate with the bounds of its confidence interval."""

    estimate: float
    low: float
    high: float


def weighted_gain(
    gains: Sequence[float], weights: Sequence[float], *, confidence: float
) -> Interval:
    """Return the weighted mean of `gains` with its percentile bootstrap interval (Efron 1979).

    Args:
        gains: Difference between the two models on each question.
        weights: Weight of each question: 1 for a score, its tokens for a loss per token.
        confidence: Between 0 and 1; the interval is two-sided.

    Returns:
        Bounds equal to the estimate for a single question or if all gains are equal; NaN if there
        is no question, no weight, or a gain that is not finite.
    """
    gain, weight = np.asarray(gains, float), np.asarray(weights, float)
    estimate = _weighted_mean(gain * weight, weight)
    if not np.isfinite(estimate):
        return Interval(float("nan"), float("nan"), float("nan"))
    if len(gain) == 1 or bool(np.all(gain == gain[0])):
        return Interval(float(estimate), float(estimate), float(estimate))
    from scipy.stats import bootstrap

    # Both models answered the same questions: resampling questions keeps each pair together, and
    # their common difficulty cancels out of the interval.
    interval = bootstrap(
        (gain * weight, weight),
        _weighted_mean,
        paired=True,
        vectorized=True,
        method="percentile",
        confidence_level=confidence,
        n_resamples=RESAMPLES,
        batch=RESAMPLES_AT_A_TIME,
        rng=np.random.default_rng(BOOTSTRAP_SEED),
    ).confidence_interval
    return Interval(float(estimate), float(interval.low), float(interval.high))


def _weighted_mean(products: np.ndarray, weights: np.ndarray, axis: int = -1) -> np.ndarray:
    with np.errstate(invalid="ignore", divide="ignore"):
        mean: np.ndarray = np.sum(products, axis=axis) / np.sum(weights, axis=axis)
    return mean


def wilson_interval(hits: int, rows: int, confidence: float) -> tuple[float, float]:
    """Return Wilson's score interval of the share `hits / rows` (E. B. Wilson, JASA 22, 1927)."""
    if rows < 1:
        return 0.0, 1.0
    from scipy.stats import binomtest

    interval = binomtest(hits, rows).proportion_ci(confidence, method="wilson")
    return float(interval.low), float(interval.high)


def score_row(question: Question, answer: Generated, loss: RowLoss, *, thinking: bool) -> RowScore:
    """Score one answer; `thinking` says whether the model was asked to think first."""
    return RowScore(
        exact_match=exact_match(answer.text, question.reference),
        token_f1=token_f1(answer.text, question.reference),
        chrf=chrf(answer.text, question.reference),
        loss_nats=_finite(loss.nats),
        loss_tokens=loss.tokens,
        form=check_form(answer, question, thinking=thinking),
    )


def score_model(
    label: ModelLabel,
    splits: Sequence[str],
    rows: Sequence[RowScore],
    ability: Sequence[RowLoss] = (),
    sampled_form: Sequence[Mapping[str, bool]] = (),
    *,
    confidence: float = 0.95,
) -> ModelScore:
    """Score one model; `rows` must not be empty.

    Args:
        label: The model's role.
        splits: The group of each row.
        rows: The score of each row.
        ability: Losses on the ability set.
        sampled_form: Form checks of the answers that were sampled.
        confidence: Of the interval of the exact-match share.
    """
    grouped = group_by(zip(splits, rows, strict=True), lambda pair: pair[0])
    losses = [
        RowLoss(math.nan if r.loss_nats is None else r.loss_nats, r.loss_tokens) for r in rows
    ]
    hits = sum(row.exact_match for row in rows)
    return ModelScore(
        label=label,
        rows=len(rows),
        exact_match=hits / len(rows),
        exact_match_interval=wilson_interval(hits, len(rows), confidence),
        token_f1=fmean(row.token_f1 for row in rows),
        chrf=fmean(row.chrf for row in rows),
        answer_loss=_finite(mean_loss(losses)),
        ability_loss=_finite(mean_loss(ability)),
        form={check: share(row.form[check] for row in rows) for check in FORM_CHECKS},
        sampled_form={check: share(form[check] for form in sampled_form) for check in FORM_CHECKS}
        if sampled_form
        else {},
        by_split={
            split: SplitScore(rows=len(group), exact_match=share(r.exact_match for _, r in group))
            for split, group in grouped.items()
        },
    )


def compare_models(
    rival: RivalLabel,
    candidate_rows: Sequence[RowScore],
    rival_rows: Sequence[RowScore],
    *,
    confidence: float,
) -> list[Comparison]:
    """Return the candidate's gain over the rival in every metric.

    Both sequences are in the order of the questions. A metric that is not finite on some question
    is left out.
    """
    pairs = list(zip(candidate_rows, rival_rows, strict=True))
    compared = []
    for metric in METRIC_NAMES:
        gains = [_gain(metric, mine, theirs) for mine, theirs in pairs]
        weights = [float(r.loss_tokens) if metric == "answer_loss" else 1.0 for r in rival_rows]
        found = weighted_gain(gains, weights, confidence=confidence)
        if math.isfinite(found.estimate):
            interval = {"gain": found.estimate, "low": found.low, "high": found.high}
            compared.append(Comparison(rival=rival, metric=metric, rows=len(pairs), **interval))
    return compared


def _gain(metric: MetricName, mine: RowScore, theirs: RowScore) -> float:
    """Return how much better `mine` is: a difference of scores, or of nats per reference token."""
    if metric != "answer_loss":
        return float(getattr(mine, metric)) - float(getattr(theirs, metric))
    if mine.loss_nats is None or theirs.loss_nats is None:
        return math.nan
    return (theirs.loss_nats - mine.loss_nats) / max(1, theirs.loss_tokens)


def choose_main_metric(asked: str, questions: Sequence[Question]) -> MetricName:
    """Return the metric that the gate decides by; 'auto' chooses by the references' length.

    Exact match if at least half of the references are short, because a short answer that is half
    right is wrong; else token F1, because a long answer is hardly ever the reference word for word.
    """
    for metric in METRIC_NAMES:
        if asked == metric:
            return metric
    lengths = [len(answer_tokens(question.reference)) for question in questions]
    return "exact_match" if median(lengths) <= LONGEST_SHORT_ANSWER_TOKENS else "token_f1"


def run_checks(candidate: ModelScore, *, differs: bool, share: float = 1.0) -> dict[str, bool]:
    """Return the checks that a candidate must pass whatever its scores, as {name: passed}.

    `share` tightens the limits: to that part of the failures that they allow.
    """
    limits = {
        STOPS: MIN_STOPPED_SHARE,
        NOT_EMPTY: MIN_NOT_EMPTY_SHARE,
        NO_LOOP: MIN_NOT_LOOPING_SHARE,
    }
    enough = {
        check: candidate.form[check] >= 1 - share * (1 - limit) - 1e-9  # of rounding
        for check, limit in limits.items()
    }
    return {**enough, "answers differ from base": differs}


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None
