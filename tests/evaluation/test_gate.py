"""A new adapter is promoted only if it is significantly better, and every verdict has numbers."""

from __future__ import annotations

from typing import Any

import pytest
from support.verdicts import BASE, FORM, GOOD, gain, report, saved, score

from qwen3ft.evaluation.gate import GatePolicy, decide_promotion
from qwen3ft.records.evaluation import Champion, ModelScore, Verdict

CHAMPION = Champion(registered_model="qwen3ft-embedded", version="3", source_uri="models:/x/3")


def decide(
    *scores: ModelScore,
    champion: Champion | None = None,
    policy: GatePolicy | None = None,
    degraded: tuple[str, ...] = (),
    **changes: Any,
) -> Verdict:
    """Decide on a candidate; by default one that is better than the base."""
    made = report(*(scores or (BASE, GOOD)), **changes)
    return decide_promotion(made, saved(degraded=degraded), champion=champion, policy=policy)


def test_the_first_adapter_that_beats_the_base_is_promoted() -> None:
    """Without a champion the base model is the bar."""
    verdict = decide()
    assert verdict.decision == "promoted"
    assert (verdict.registered_model, verdict.version) == ("qwen3ft-embedded", "4")
    better, first = verdict.reasons
    assert better == (
        "better than the base model: exact match 40.0% against 10.0% on 50 questions, "
        "gain +30.0 (+25.0 to +35.0) points at 95% confidence"
    )
    assert first == "no adapter was in use"
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
    verdict = decide(gains=(gain(value, half=half),))
    assert verdict.decision == decision
    assert verdict.reasons[0].startswith(begins + " the base model: ")


def test_a_champion_must_be_beaten_too() -> None:
    """Better than the base alone is not enough; the reason names the champion's version."""
    scores = (BASE, score("champion", 0.39), GOOD)
    kept = decide(*scores, gains=(gain(0.3), gain(0.01, "champion")), champion=CHAMPION)
    begins = "not significantly better than champion v3: exact match 40.0%"
    assert kept.decision == "kept"
    assert kept.reasons[0].startswith(begins)
    verdict = decide(*scores, gains=(gain(0.3), gain(0.07, "champion")), champion=CHAMPION)
    assert verdict.decision == "promoted"
    assert verdict.reasons[0].startswith("better than champion v3")


def test_beating_the_champion_is_not_enough() -> None:
    """A candidate between champion and base is kept: the base alone would do better."""
    scores = (score("base", 0.5), score("champion", 0.1), score("candidate", 0.3))
    verdict = decide(*scores, gains=(gain(-0.2), gain(0.2, "champion")), champion=CHAMPION)
    assert verdict.decision == "kept"
    assert verdict.reasons[0].startswith("worse than the base model")


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"token_f1": 0.079}, "token F1 7.9%, below the 10.0% of the base model"),
        ({"token_f1": 0.085}, None),
        ({"chrf": 0.079}, "chrF 7.9%, below the 10.0% of the base model"),
        ({"chrf": 0.085}, None),
        ({"answer_loss": 1.06}, "answer loss 1.06 against 1 of the base model (limit +5%)"),
        ({"answer_loss": 1.04}, None),
        ({"answer_loss": None}, "answer loss not finite"),
        (
            {"form": {**FORM, "language of the question": 0.96}},
            "language of the question: 96.0% of answers against 100.0% for the base model",
        ),
        ({"form": {**FORM, "language of the question": 0.985}}, None),
        ({"form": {"stops by itself": 1.0}}, "language of the question: 0.0% of answers"),
        (
            {"sampled_form": {"stops by itself": 0.89}},
            "stops by itself: 89.0% of sampled answers against 100.0% for the base model",
        ),
        ({"sampled_form": {"stops by itself": 0.91}}, None),
        ({"ability_loss": 2.26}, "it forgets: loss on the ability set 2.26 against 2"),
        ({"ability_loss": 2.24}, None),
        ({"ability_loss": None}, "the loss on the ability set is missing or not finite"),
        ({"rows": 20}, "only 20 held-out questions, at least 30 are needed"),
    ],
)
def test_past_a_limit_a_better_candidate_is_kept_and_within_it_promoted(
    changes: dict[str, Any], said: str | None
) -> None:
    """It does not matter how much better the candidate is in the main metric."""
    verdict = decide(BASE, score("candidate", 0.4, **changes))
    assert verdict.decision == ("promoted" if said is None else "kept"), verdict.reasons
    assert said is None or any(reason.startswith(said) for reason in verdict.reasons)


def test_any_loss_is_above_a_rival_that_has_none() -> None:
    """A relative limit allows nothing above a loss of zero."""
    base = score("base", 0.1, answer_loss=0.0)
    for loss, decision in ((0.3, "kept"), (0.0, "promoted")):
        candidate = score("candidate", 0.4, answer_loss=loss)
        assert decide(base, candidate).decision == decision


@pytest.mark.parametrize(("broken", "decision"), [(1, "promoted"), (2, "kept")])
def test_of_few_answers_a_single_odd_one_is_no_sign(broken: int, decision: str) -> None:
    """One of 30 answers is more than 2 %, and is allowed."""
    form = {**FORM, "stops by itself": 1 - broken / 30}
    scores = (score("base", 0.1, rows=30), score("candidate", 0.4, rows=30, form=form))
    gains = (gain(0.3, rows=30),)
    assert decide(*scores, gains=gains).decision == decision


def test_the_limits_hold_against_the_champion_too() -> None:
    """The champion's answers are what users would lose."""
    scores = (BASE, score("champion", 0.3), score("candidate", 0.4, chrf=0.2))
    verdict = decide(*scores, gains=(gain(0.3), gain(0.1, "champion")), champion=CHAMPION)
    assert verdict.decision == "kept"
    assert verdict.reasons == ("chrF 20.0%, below the 30.0% of champion v3",)


def test_the_policy_sets_the_limits() -> None:
    """Fewer rows or more forgetting pass if the policy allows them."""
    scores = (score("base", 0.1, rows=12), score("candidate", 0.4, rows=12, ability_loss=2.4))
    gains = (gain(0.3, rows=12),)
    policy = GatePolicy(min_rows=12, max_ability_loss_rise=0.5)
    assert decide(*scores, gains=gains).decision == "kept"
    assert decide(*scores, gains=gains, policy=policy).decision == "promoted"


def test_a_loss_can_be_the_main_metric() -> None:
    """Its gain is shown in nats, and a worse exact match within its limit is allowed."""
    scores = (score("base", 0.1), score("candidate", 0.09, answer_loss=0.8))
    gains = (gain(0.2, metric="answer_loss"),)
    verdict = decide(*scores, gains=gains, main_metric="answer_loss")
    assert verdict.decision == "promoted"
    numbers = "answer loss 0.8 against 1 on 50 questions, gain +0.200 (+0.150 to +0.250) nats"
    assert numbers in verdict.reasons[0]


@pytest.mark.parametrize(
    ("scores", "changes", "said"),
    [
        ((BASE, GOOD), {"degraded": ("lower rank: 6 to 3",)}, "lower rank: 6 to 3"),
        ((score("base", 0.1, rows=40), GOOD), {}, "40 questions, not 50"),
        ((BASE, GOOD), {"gains": ()}, "exact match could not be compared with that of the base"),
        ((BASE,), {}, ""),
    ],
)
def test_what_proves_no_gain_promotes_nothing(
    scores: tuple[ModelScore, ...], changes: dict[str, Any], said: str
) -> None:
    """Degraded runs, other questions, and a missing interval or candidate have their reasons."""
    verdict = decide(*scores, **changes)
    assert verdict.decision == "kept"
    assert said in verdict.reasons[0]


def test_every_failed_check_is_named() -> None:
    """Checks that passed are not named."""
    checks = {"not empty": False, "no loops": True, "answers differ from base": False}
    verdict = decide(checks=checks)
    assert verdict.decision == "kept"
    assert verdict.reasons == ("failed check: not empty", "failed check: answers differ from base")
    assert verdict.sentence == "kept: failed check: not empty (and 1 more reason)"


def test_a_champion_that_was_not_scored_defers_the_decision() -> None:
    """Replacing what could not be compared would be a guess; a bad candidate is kept anyway."""
    assert decide(champion=CHAMPION).decision == "deferred"
    assert decide(gains=(gain(-0.3),), champion=CHAMPION).decision == "kept"
