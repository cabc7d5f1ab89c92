"""A new adapter is promoted only if it is significantly better, and every verdict has numbers."""

from __future__ import annotations

from typing import Any

import pytest
from support.verdicts import BASE, FORM, GOOD, gain, report, saved, score

from qwen3ft.evaluation.gate import GatePolicy, decide_promotion
from qwen3ft.records.evaluation import (
    Champion,
)

CHAMPION = Champion(registered_model="qwen3ft-embedded", version="3", source_uri="models:/x/3")


def test_the_first_adapter_that_beats_the_base_is_promoted() -> None:
    """Without a champion the base model is the bar."""
    verdict = decide_promotion(report(BASE, GOOD), saved(), champion=None)
    assert verdict.decision == "promoted"
    assert (verdict.registered_model, verdict.version) == ("qwen3ft-embedded", "4")
    better, first = verdict.reasons
    assert better == (
        "better than the base model: exact match 40.0% against 10.0% on 50 questions, "
        "gain +30.0 (+25.0 to +35.0) points at 95% confidence"
    )
    assert first == "no adapter is in use yet"
    assert verdict.sentence == f"promoted: {better}"


@pytest.mark.parametrize(
    ("value", "half", "decision", "begins"),
    [
        (0.06, 0.05, "promoted", "better than"),
        (0.05, 0.05, "kept", "not significantly better than"),  # the bound has to be above zero
        (0.04, 0.05, "kept", "not significantly better than"),
        (0.0, 0.0, "kept", "no better than"),
        (-0.01, 0.05, "kept", "no better than"),
        (-0.1, 0.05, "kept", "worse than"),
        (0.1, float("nan"), "kept", "not significantly better than"),
    ],
)
def test_the_lower_bound_of_the_gain_decides(
    value: float, half: float, decision: str, begins: str
) -> None:
    """A gain that may be luck, or no gain, keeps the adapter in use."""
    gains = (gain(value, half=half),)
    verdict = decide_promotion(report(BASE, GOOD, gains=gains), saved(), champion=None)
    assert verdict.decision == decision
    assert verdict.reasons[0].startswith(begins + " the base model: ")


def test_a_champion_must_be_beaten_too() -> None:
    """Better than the base alone is not enough; the reason names the champion's version."""
    scores = (BASE, score("champion", 0.39), GOOD)
    gains = (gain(0.3), gain(0.01, "champion"))
    verdict = decide_promotion(report(*scores, gains=gains), saved(), champion=CHAMPION)
    assert verdict.decision == "kept"
    assert verdict.reasons[0].startswith(
        "not significantly better than champion v3: exact match 40.0%"
    )
    better = report(*scores, gains=(gain(0.3), gain(0.07, "champion")))
    verdict = decide_promotion(better, saved(), champion=CHAMPION)
    assert verdict.decision == "promoted"
    assert verdict.reasons[0].startswith("better than champion v3")


def test_beating_the_champion_is_not_enough() -> None:
    """A candidate between champion and base is kept: the base alone would do better."""
    scores = (score("base", 0.5), score("champion", 0.1), score("candidate", 0.3))
    gains = (gain(-0.2), gain(0.2, "champion"))
    verdict = decide_promotion(report(*scores, gains=gains), saved(), champion=CHAMPION)
    assert verdict.decision == "kept"
    assert verdict.reasons[0].startswith("worse than the base model")


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"token_f1": 0.079}, "token F1 7.9%, below the 10.0% of the base model"),
        ({"chrf": 0.079}, "chrF 7.9%, below the 10.0% of the base model"),
        ({"answer_loss": 1.06}, "answer loss 1.06 against 1 of the base model (limit +5%)"),
        ({"answer_loss": None}, "answer loss not finite"),
        (
            {"form": {**FORM, "language of the question": 0.96}},
            "language of the question: 96.0% of answers against 100.0% for the base model",
        ),
        (
            {"sampled_form": {"stops by itself": 0.89}},
            "stops by itself: 89.0% of sampled answers against 100.0% for the base model",
        ),
        ({"form": {"stops by itself": 1.0}}, "language of the question: 0.0% of answers"),
        ({"ability_loss": 2.26}, "it forgets: loss on the ability set 2.26 against 2"),
        ({"ability_loss": None}, "the loss on the ability set is missing or not finite"),
        ({"rows": 20}, "only 20 held-out questions, at least 30 are needed"),
    ],
)
def test_each_limit_keeps_a_better_candidate_out(changes: dict[str, Any], said: str) -> None:
    """It does not matter how much better the candidate is in the main metric."""
    verdict = decide_promotion(
        report(BASE, score("candidate", 0.4, **changes)), saved(), champion=None
    )
    assert verdict.decision == "kept"
    assert any(reason.startswith(said) for reason in verdict.reasons), verdict.reasons


def test_any_loss_is_above_a_rival_that_has_none() -> None:
    """A relative limit allows nothing above a loss of zero."""
    base = score("base", 0.1, answer_loss=0.0)
    for loss, decision in ((0.3, "kept"), (0.0, "promoted")):
        candidate = score("candidate", 0.4, answer_loss=loss)
        assert (
            decide_promotion(report(base, candidate), saved(), champion=None).decision == decision
        )


@pytest.mark.parametrize(
    "changes",
    [
        {"token_f1": 0.085},
        {"chrf": 0.085},
        {"answer_loss": 1.04},
        {"form": {**FORM, "language of the question": 0.985}},
        {"sampled_form": {"stops by itself": 0.91}},
        {"ability_loss": 2.24},
        {"rows": 50},
    ],
)
def test_within_the_limits_a_better_candidate_is_promoted(changes: dict[str, Any]) -> None:
    """A little worse in something else is the price of being better."""
    verdict = decide_promotion(
        report(BASE, score("candidate", 0.4, **changes)), saved(), champion=None
    )
    assert verdict.decision == "promoted", verdict.reasons


@pytest.mark.parametrize(("broken", "decision"), [(1, "promoted"), (2, "kept")])
def test_of_few_answers_a_single_odd_one_is_no_sign(broken: int, decision: str) -> None:
    """One of 30 answers is more than 2 %, and is allowed."""
    form = {**FORM, "stops by itself": 1 - broken / 30}
    scores = (score("base", 0.1, rows=30), score("candidate", 0.4, rows=30, form=form))
    gains = (gain(0.3).model_copy(update={"rows": 30}),)
    assert (
        decide_promotion(report(*scores, gains=gains), saved(), champion=None).decision == decision
    )


def test_the_limits_hold_against_the_champion_too() -> None:
    """The champion's answers are what users would lose."""
    scores = (BASE, score("champion", 0.3), score("candidate", 0.4, chrf=0.2))
    gains = (gain(0.3), gain(0.1, "champion"))
    verdict = decide_promotion(report(*scores, gains=gains), saved(), champion=CHAMPION)
    assert verdict.decision == "kept"
    assert verdict.reasons == ("chrF 20.0%, below the 30.0% of champion v3",)


def test_the_policy_sets_the_limits() -> None:
    """Fewer rows or more forgetting pass if the policy allows them."""
    scores = (score("base", 0.1, rows=12), score("candidate", 0.4, rows=12, ability_loss=2.4))
    gains = (gain(0.3).model_copy(update={"rows": 12}),)
    policy = GatePolicy(min_rows=12, max_ability_loss_rise=0.5)
    few = report(*scores, gains=gains)
    assert decide_promotion(few, saved(), champion=None).decision == "kept"
    assert decide_promotion(few, saved(), champion=None, policy=policy).decision == "promoted"


def test_a_loss_can_be_the_main_metric() -> None:
    """Its gain is shown in nats, and a worse exact match within its limit is allowed."""
    scores = (score("base", 0.1), score("candidate", 0.09, answer_loss=0.8))
    gains = (gain(0.2, metric="answer_loss"),)
    verdict = decide_promotion(
        report(*scores, gains=gains, main_metric="answer_loss"), saved(), champion=None
    )
    assert verdict.decision == "promoted"
    assert (
        "answer loss 0.8 against 1 on 50 questions, gain +0.200 (+0.150 to +0.250) nats"
        in (verdict.reasons[0])
    )


def test_a_degraded_run_is_kept_however_good() -> None:
    """The reason names the degradation."""
    degraded = saved(degraded=("lower rank: 6 to 3",))
    verdict = decide_promotion(report(BASE, GOOD), degraded, champion=None)
    assert verdict.decision == "kept"
    assert "lower rank: 6 to 3" in verdict.reasons[0]


def test_every_failed_check_is_named() -> None:
    """Checks that passed are not named."""
    checks = {"not empty": False, "no loops": True, "answers differ from base": False}
    verdict = decide_promotion(report(BASE, GOOD, checks=checks), saved(), champion=None)
    assert verdict.decision == "kept"
    assert verdict.reasons == (
        "failed check: not empty",
        "failed check: answers differ from base",
    )
    assert verdict.sentence == "kept: failed check: not empty (and 1 more)"


def test_a_champion_that_was_not_scored_defers_the_decision() -> None:
    """Replacing what could not be compared would be a guess; a bad candidate is kept anyway."""
    assert decide_promotion(report(BASE, GOOD), saved(), champion=CHAMPION).decision == "deferred"
    bad = report(BASE, GOOD, gains=(gain(-0.3),))
    assert decide_promotion(bad, saved(), champion=CHAMPION).decision == "kept"


def test_scores_on_different_questions_are_not_compared() -> None:
    """A rival scored on other questions cannot be beaten."""
    scores = report(score("base", 0.1, rows=40), GOOD)
    verdict = decide_promotion(scores, saved(), champion=None)
    assert verdict.decision == "kept"
    assert "40 questions, not 50" in verdict.reasons[0]


def test_a_metric_that_was_not_compared_promotes_nothing() -> None:
    """Without an interval there is no proof of a gain."""
    verdict = decide_promotion(report(BASE, GOOD, gains=()), saved(), champion=None)
    assert verdict.reasons == ("exact match could not be compared with that of the base model",)


def test_a_report_without_a_candidate_promotes_nothing() -> None:
    """An incomplete report is no proof."""
    assert decide_promotion(report(BASE), saved(), champion=None).decision == "kept"
