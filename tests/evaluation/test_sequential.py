"""Asking stops once the verdict is clear, and not before."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
from support.verdicts import FORM, gain, report, saved, score

from qwen3ft.config import TrainingConfig
from qwen3ft.evaluation.answers import Question
from qwen3ft.evaluation.gate import GatePolicy
from qwen3ft.evaluation.scoring import run_checks
from qwen3ft.evaluation.sequential import (
    LOOKS,
    Look,
    bounds,
    conditional_power,
    plan_looks,
    settled,
    spent,
    z_of,
)
from qwen3ft.records.evaluation import Comparison, InferenceReport

POLICY = GatePolicy()


@pytest.mark.parametrize(
    "known",
    [
        (3.710, 2.511, 1.993),
        pytest.param(
            (4.877, 3.357, 2.680, 2.290, 2.031), marks=pytest.mark.slow
        ),  # of 5 dimensions
    ],
)
def test_bounds_are_those_of_the_literature(known: tuple[float, ...]) -> None:
    """Looks at 5 % two-sided, as tables of the O'Brien-Fleming-like function give them."""
    shares = tuple((number + 1) / len(known) for number in range(len(known)))
    assert bounds(shares, 0.025) == pytest.approx(known, abs=0.002)
    assert spent(1.0, 0.025) == pytest.approx(0.025)
    assert bounds((1.0,), 0.025) == pytest.approx((1.96,), abs=0.001)


def test_all_looks_together_err_as_rarely_as_one() -> None:
    """Of equal models 2.5 % pass one of the bounds."""
    steps = np.random.default_rng(0).normal(size=(40_000, 4))
    sums = steps.cumsum(axis=1)[:, [0, 1, 3]]
    z = sums / np.sqrt([1, 2, 4])
    passed = (z >= bounds(LOOKS, 0.025)).any(axis=1).mean()
    assert passed == pytest.approx(0.025, abs=0.003)


def test_conditional_power_falls_with_the_questions_left() -> None:
    """With the design's gain it is the power; without a gain it vanishes."""
    assert conditional_power(3.2416, 0.999, 1.96) > 0.99
    assert conditional_power(0.0, 1e-9, 1.96) == pytest.approx(0.9, abs=0.001)
    assert conditional_power(0.0, 0.25, 1.96) > conditional_power(0.0, 0.5, 1.96) > 0.2
    assert conditional_power(-0.5, 0.5, 1.96) < 0.2


def questions(count: int) -> list[Question]:
    return [Question(f"q{index}", "a", f"kind {index % 3}") for index in range(count)]


def test_looks_are_parts_of_the_questions() -> None:
    """Each holds nearly all of those before, from every split; the last holds all."""
    looks = plan_looks(TrainingConfig(), questions(600), "exact_match")
    assert [len(look.rows) for look in looks] == [150, 300, 600]
    first, second, last = ({*look.rows} for look in looks)
    assert len(first - second) <= 2
    assert second < last
    assert {look.confidence for look in looks} == {looks[0].confidence}
    assert 0.95 < looks[0].confidence < 0.952


@pytest.mark.parametrize(
    ("count", "metric", "changes"),
    [
        (600, "exact_match", {"stop_asking_early": False}),
        (359, "exact_match", {}),
        (600, "answer_loss", {}),
    ],
)
def test_all_is_asked_where_nothing_can_be_saved(
    count: int, metric: str, changes: dict[str, Any]
) -> None:
    """By the setting, with few questions, and where the metric needs no answers."""
    [look] = plan_looks(TrainingConfig(**changes), questions(count), metric)
    assert (len(look.rows), look.confidence) == (count, 0.95)


def after_a_quarter(value: float, spread: float, **candidate: Any) -> InferenceReport:
    """Report a gain with a standard error of `spread`."""
    scores = (score("base", 0.3), score("candidate", 0.3 + value, **candidate))
    return report(*scores, gains=(gain(value, half=1.96 * spread),))


@pytest.mark.parametrize(
    ("found", "why"),
    [
        (after_a_quarter(0.3, 0.04), "surely better (z 7.50, bound 4.33)"),
        (after_a_quarter(0.15, 0.04), ""),  # z 3.75
        (after_a_quarter(0.0, 0.04), ""),
        (after_a_quarter(-0.12, 0.04), "hardly to become better any more (z -3.00)"),
        (after_a_quarter(0.3, 0.04, ability_loss=2.5), "it forgets, whatever it answers"),
        # of broken form
        (after_a_quarter(0.3, 0.04, form={**FORM, "stops by itself": 0.97}), ""),
    ],
)
def test_a_verdict_is_clear_or_it_is_not(found: InferenceReport, why: str) -> None:
    """Surely better, hopeless, forgotten; everything else goes on."""
    look = Look([], 0.25, bounds(LOOKS, 0.025)[0], 0.95)
    assert settled(look, found, saved(), None, POLICY) == why


def test_a_look_allows_its_part_of_the_failures() -> None:
    candidate = score("candidate", 0.5, form={**FORM, "stops by itself": 0.96})
    assert all(run_checks(candidate, differs=True).values())
    assert not run_checks(candidate, differs=True, share=0.25)["stops by itself"]


def test_z_is_read_from_the_interval() -> None:
    """Also where all questions agree."""
    ends = {"gain": 0.1, "low": 0.1, "high": 0.1}
    one = Comparison(rival="base", metric="exact_match", rows=3, **ends)
    assert z_of(one, 0.95) == math.inf
    none = one.model_copy(update={"gain": 0.0})
    assert z_of(none, 0.95) == 0.0
