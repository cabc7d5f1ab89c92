"""The gate: decide whether a new adapter replaces the one in use."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Literal

from qwen3ft.config import TrainingConfig
from qwen3ft.evaluation.wording import METRIC_NAMES, interval_text, score_text
from qwen3ft.records.base import Record
from qwen3ft.records.evaluation import Champion, InferenceReport, MetricName, ModelScore, Verdict
from qwen3ft.records.model import SavedAdapter


class GatePolicy(Record):
    """Limits of the gate; shares are between 0 and 1."""

    confidence: float = 0.95
    """Confidence of the interval that has to be above zero."""
    min_rows: int = 30
    """Fewest held-out questions that can prove a gain."""
    max_score_loss: float = 0.02
    """Largest loss in any score but the main one."""
    max_answer_loss_rise: float = 0.05
    """Largest rise of the answer loss, as a share of the rival's."""
    max_form_loss: float = 0.02
    """Largest loss in the share of answers that pass a form check."""
    # Of 100 answers, the difference of two shares of 95 % has a standard error of 3 points.
    max_sampled_form_loss: float = 0.10
    """The same for sampled answers, which are fewer and vary more."""
    # Absolute, so that it means the same for a base model that finds the answers easy or hard.
    max_ability_loss_rise: float = 0.25
    """Largest rise of the ability loss, in nats per token."""


def gate_policy(config: TrainingConfig) -> GatePolicy:
    """Return the limits that `config` sets."""
    return GatePolicy(
        confidence=config.gate_confidence,
        min_rows=config.gate_min_rows,
        max_ability_loss_rise=config.max_ability_loss_rise,
    )


def decide_promotion(
    report: InferenceReport,
    saved: SavedAdapter,
    *,
    champion: Champion | None,
    policy: GatePolicy | None = None,
) -> Verdict:
    """Return the verdict on `saved`, with its reasons in plain English.

    - kept: the run is degraded, the questions are too few, a check failed, a limit is exceeded, or
      the adapter is not significantly better than both the base model and the champion.
    - deferred: there is a champion that was not scored on the same questions.
    - promoted: everything else.
    """
    limits = policy or GatePolicy()
    candidate, base = report.score("candidate"), report.score("base")
    if candidate is None or base is None:
        return _verdict(saved, "kept", ["the report does not score both base and candidate"])
    rivals = [("the base model", base)]
    in_use = report.score("champion")
    if champion is not None and in_use is not None:
        rivals.append((f"champion v{champion.version}", in_use))
    gains: list[str] = []
    worse: list[str] = []
    for name, rival in reversed(rivals):
        better, sentence = _compare_main(report, candidate, rival, name, limits)
        (gains if better else worse).append(sentence)
    objections = [
        *_disqualified(report, saved, candidate, limits),
        *worse,
        *(
            loss
            for name, rival in rivals
            for loss in _losses(report, candidate, rival, name, limits)
        ),
        *_forgetting(candidate, base, limits),
    ]
    if objections:
        return _verdict(saved, "kept", objections)
    if champion is not None and in_use is None:
        missing = f"champion v{champion.version} was not scored on the same questions"
        return _verdict(saved, "deferred", [missing, *gains])
    if champion is None:
        gains.append("no adapter was in use")
    return _verdict(saved, "promoted", gains)


def _verdict(
    saved: SavedAdapter, decision: Literal["promoted", "kept", "deferred"], reasons: list[str]
) -> Verdict:
    return Verdict(
        decision=decision,
        reasons=tuple(reasons),
        registered_model=saved.registered_model,
        version=saved.version,
    )


def _disqualified(
    report: InferenceReport, saved: SavedAdapter, candidate: ModelScore, limits: GatePolicy
) -> Iterator[str]:
    """Yield the reasons that keep an adapter out however well it scores."""
    if saved.degraded:
        why = "; ".join(saved.degraded)
        yield f"the run is degraded ({why}) and can only be promoted by hand"
    if candidate.rows < limits.min_rows:
        yield f"only {candidate.rows} held-out questions, at least {limits.min_rows} are needed"
    for name, passed in report.checks.items():
        if not passed:
            yield f"failed check: {name}"


def _compare_main(
    report: InferenceReport, candidate: ModelScore, rival: ModelScore, name: str, limits: GatePolicy
) -> tuple[bool, str]:
    """Return (candidate is significantly better than `rival`, sentence with the numbers)."""
    metric = report.main_metric
    comparison = report.comparison(rival.label, metric)
    if comparison is None:
        return False, f"{METRIC_NAMES[metric]} could not be compared with that of {name}"
    if not candidate.rows == rival.rows == comparison.rows:
        return False, f"{name} was scored on {rival.rows} questions, not {candidate.rows}"
    # The lower bound of a two-sided interval: of equal adapters, about one in 40 passes at 95 %.
    # A comparison with NaN is false, so a bound that is not a number never wins.
    better = comparison.low > 0
    result = (
        "better than"
        if better
        else "worse than"
        if comparison.high < 0
        else "not significantly better than"
        if comparison.gain > 0
        else "no better than"
    )
    mine, theirs = (score_text(metric, getattr(one, metric)) for one in (candidate, rival))
    return better, (
        f"{result} {name}: {METRIC_NAMES[metric]} {mine} against {theirs} "
        f"on {comparison.rows} questions, gain {interval_text(comparison)} "
        f"at {100 * (report.confidence or limits.confidence):.3g}% confidence"
    )


def _losses(
    report: InferenceReport, candidate: ModelScore, rival: ModelScore, name: str, limits: GatePolicy
) -> Iterator[str]:
    """Yield the other metrics and form checks in which the candidate is too much worse."""
    scores: tuple[MetricName, ...] = ("exact_match", "token_f1", "chrf")
    for metric in scores:
        found, wanted = getattr(candidate, metric), getattr(rival, metric)
        if metric != report.main_metric and found < wanted - limits.max_score_loss:
            yield f"{METRIC_NAMES[metric]} {found:.1%}, below the {wanted:.1%} of {name}"
    loss, theirs_loss = candidate.answer_loss, rival.answer_loss
    most_loss = None if theirs_loss is None else theirs_loss * (1 + limits.max_answer_loss_rise)
    if loss is None or (most_loss is not None and loss > most_loss):
        yield (
            f"answer loss {score_text('loss', loss)} against {score_text('loss', theirs_loss)} "
            f"of {name} (limit {limits.max_answer_loss_rise:+.0%})"
        )
    one_answer = 1 / max(1, rival.rows) + 1e-9  # among few answers a single odd one proves nothing
    for kind, field, allowed in (
        ("answers", "form", max(limits.max_form_loss, one_answer)),
        ("sampled answers", "sampled_form", limits.max_sampled_form_loss),
    ):
        for check, share in getattr(rival, field).items():
            passed = getattr(candidate, field).get(check, 0.0)
            if passed < share - allowed:
                yield f"{check}: {passed:.1%} of {kind} against {share:.1%} for {name}"


def _forgetting(candidate: ModelScore, base: ModelScore, limits: GatePolicy) -> Iterator[str]:
    """Yield a reason if the candidate lost too much of what the base model could do."""
    mine, theirs = candidate.ability_loss, base.ability_loss
    if mine is None or theirs is None:
        yield "the loss on the ability set is missing or not finite"
    elif mine - theirs > limits.max_ability_loss_rise:
        yield (
            f"it forgets: loss on the ability set {mine:.4g} against {theirs:.4g} of the base "
            f"model, {mine - theirs:+.2f} nats (limit {limits.max_ability_loss_rise:+.2f})"
        )
