"""Whether a new adapter replaces the one in use: the rules, and nothing else.

Guarantees: a pure function of the report; promoted only when the adapter is not degraded, passes
every check and is better than the base and than the champion on the same questions. Every reason
says its numbers. Does not talk to the registry: that is `qwen3ft.registry`.
"""

from __future__ import annotations

from typing import Literal

from qwen3ft.records import SavedAdapter
from qwen3ft.result_records import Champion, InferenceReport, ModelScore, Verdict

MIN_LOSS_GAIN = 0.01
"""With equal exact match, the answer loss must be lower by this share to count as better."""


def decide(report: InferenceReport, saved: SavedAdapter, *, champion: Champion | None) -> Verdict:
    """The verdict on `saved`, with the reasons in plain English.

    kept: degraded, a failed check, or not better than the base or the champion.
    deferred: there is a champion, but the report does not score it on the same questions.
    promoted: everything else.
    """
    candidate, base = report.score("candidate"), report.score("base")
    if candidate is None or base is None:
        return _verdict(saved, "kept", ["the report does not score both base and candidate"])
    objections = [*_degraded(saved), *_failed_checks(report)]
    gains: list[str] = []
    rivals = [("the base model", base)]
    in_use = report.score("champion")
    if champion is not None and in_use is not None:
        rivals.append((f"champion v{champion.version}", in_use))
    for name, rival in rivals:
        better, comparison = _compare(candidate, rival, name)
        (gains if better else objections).append(comparison)
    if objections:
        return _verdict(saved, "kept", objections)
    if champion is not None and in_use is None:
        missing = f"champion v{champion.version} was not scored on the same questions"
        return _verdict(saved, "deferred", [*gains, missing])
    if champion is None:
        gains.append("no adapter is in use yet")
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


def _degraded(saved: SavedAdapter) -> list[str]:
    if not saved.degraded:
        return []
    return [
        f"the run is degraded ({'; '.join(saved.degraded)}), which is never promoted on its own"
    ]


def _failed_checks(report: InferenceReport) -> list[str]:
    return [f"failed check: {name}" for name, passed in report.checks.items() if not passed]


def _compare(candidate: ModelScore, rival: ModelScore, name: str) -> tuple[bool, str]:
    """Whether `candidate` is better than `rival`, and the sentence that says by what."""
    if candidate.rows != rival.rows:
        return False, f"{name} was scored on {rival.rows} questions, not {candidate.rows}"
    matches = (
        f"exact match {candidate.exact_match:.1%} against {rival.exact_match:.1%} "
        f"on {candidate.rows} questions"
    )
    if candidate.exact_match != rival.exact_match:
        better = candidate.exact_match > rival.exact_match
        return better, f"{'better' if better else 'no better'} than {name}: {matches}"
    losses = f"answer loss {candidate.answer_loss:.4g} against {rival.answer_loss:.4g}"
    # Written so that a loss that is not a number never wins.
    better = candidate.answer_loss < rival.answer_loss * (1 - MIN_LOSS_GAIN)
    if better:
        return True, f"better than {name}: equal {matches}, but {losses}"
    return False, (
        f"no better than {name}: equal {matches}, and {losses} is not lower by {MIN_LOSS_GAIN:.0%}"
    )
