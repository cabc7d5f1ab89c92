"""A new adapter is promoted only for being better, and every verdict says its numbers."""

from __future__ import annotations

import math
from typing import Any, Literal

import pytest

from qwen3ft.promote import decide
from qwen3ft.records import SavedAdapter
from qwen3ft.result_records import Champion, InferenceReport, ModelScore

CHAMPION = Champion(registered_model="qwen3ft-embedded", version="3", source_uri="models:/x/3")
Label = Literal["base", "champion", "candidate"]


def score(label: Label, exact_match: float, answer_loss: float = 1.0, rows: int = 50) -> ModelScore:
    return ModelScore(
        label=label,
        rows=rows,
        exact_match=exact_match,
        answer_loss=answer_loss,
        stopped_share=1.0,
        empty_share=0.0,
        looping_share=0.0,
    )


def report(*scores: ModelScore, checks: dict[str, bool] | None = None) -> InferenceReport:
    return InferenceReport(
        adapter_path="adapter",
        questions_sha256="0" * 64,
        scores=scores,
        samples=(),
        answers_path="answers.jsonl",
        checks=checks or {"not empty": True},
    )


def saved(**changes: Any) -> SavedAdapter:
    values: dict[str, Any] = {
        "path": "adapter",
        "sha256": "1" * 64,
        "size_bytes": 1,
        "model_name": "embedded",
        "registered_model": "qwen3ft-embedded",
        "version": "4",
    }
    return SavedAdapter(**{**values, **changes})


def test_the_first_adapter_that_beats_the_base_is_promoted() -> None:
    """Without a champion the base model is the bar."""
    verdict = decide(report(score("base", 0.1), score("candidate", 0.9)), saved(), champion=None)
    assert verdict.decision == "promoted"
    assert (verdict.registered_model, verdict.version) == ("qwen3ft-embedded", "4")
    assert "better than the base model: exact match 90.0% against 10.0%" in verdict.reasons[0]
    assert verdict.reasons[-1] == "no adapter is in use yet"


@pytest.mark.parametrize(
    ("candidate", "base", "decision"),
    [
        ((0.5, 9.0), (0.4, 1.0), "promoted"),  # exact match decides, whatever the loss
        ((0.4, 0.1), (0.5, 1.0), "kept"),
        ((0.0, 0.5), (0.0, 1.0), "promoted"),
        ((0.5, 0.98), (0.5, 1.0), "promoted"),
        ((0.5, 0.995), (0.5, 1.0), "kept"),  # within the margin of 1 %
        ((0.5, 1.0), (0.5, 1.0), "kept"),
        ((0.5, math.nan), (0.5, 1.0), "kept"),
        ((0.5, 1.0), (0.5, math.nan), "kept"),
        ((0.5, -0.0), (0.5, 0.0), "kept"),
    ],
)
def test_exact_match_decides_and_then_the_loss(
    candidate: tuple[float, float], base: tuple[float, float], decision: str
) -> None:
    """Equal exact match is settled by an answer loss at least 1 % lower; NaN never wins."""
    scores = report(score("base", *base), score("candidate", *candidate))
    assert decide(scores, saved(), champion=None).decision == decision


def test_a_champion_must_be_beaten_strictly() -> None:
    """The same scores as the champion's keep the champion, with its version in the reason."""
    scores = (score("base", 0.1), score("champion", 0.9), score("candidate", 0.9))
    verdict = decide(report(*scores), saved(), champion=CHAMPION)
    assert verdict.decision == "kept"
    assert verdict.reasons[0].startswith("no better than champion v3: equal exact match 90.0%")
    better = report(*scores[:2], score("candidate", 0.92))
    assert decide(better, saved(), champion=CHAMPION).decision == "promoted"


def test_beating_the_champion_is_not_enough() -> None:
    """A candidate between champion and base is kept: the base alone would do better."""
    scores = report(score("base", 0.5), score("champion", 0.1), score("candidate", 0.3))
    verdict = decide(scores, saved(), champion=CHAMPION)
    assert verdict.decision == "kept"
    assert len(verdict.reasons) == 1
    assert "the base model" in verdict.reasons[0]


def test_a_degraded_run_is_kept_however_good() -> None:
    """The reason names what was degraded."""
    verdict = decide(
        report(score("base", 0.1), score("candidate", 0.9)),
        saved(degraded=("lower rank: 6 to 3",)),
        champion=None,
    )
    assert verdict.decision == "kept"
    assert "lower rank: 6 to 3" in verdict.reasons[0]


def test_every_failed_check_is_named() -> None:
    """Checks that passed are not."""
    checks = {"not empty": False, "no loops": True, "answers differ from base": False}
    verdict = decide(
        report(score("base", 0.1), score("candidate", 0.9), checks=checks), saved(), champion=None
    )
    assert verdict.decision == "kept"
    assert verdict.reasons == (
        "failed check: not empty",
        "failed check: answers differ from base",
    )


def test_a_champion_that_was_not_scored_defers_the_decision() -> None:
    """Replacing what could not be compared would be a guess; a bad candidate is kept anyway."""
    good = report(score("base", 0.1), score("candidate", 0.9))
    assert decide(good, saved(), champion=CHAMPION).decision == "deferred"
    bad = report(score("base", 0.9), score("candidate", 0.1))
    assert decide(bad, saved(), champion=CHAMPION).decision == "kept"


def test_scores_on_different_questions_are_not_compared() -> None:
    """A rival scored on other questions cannot be beaten."""
    scores = report(score("base", 0.1, rows=40), score("candidate", 0.9))
    verdict = decide(scores, saved(), champion=None)
    assert verdict.decision == "kept"
    assert "40 questions, not 50" in verdict.reasons[0]


def test_a_report_without_a_candidate_promotes_nothing() -> None:
    """An incomplete report is no proof."""
    assert decide(report(score("base", 0.1)), saved(), champion=None).decision == "kept"
