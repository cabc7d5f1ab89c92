"""Stop asking once the verdict is clear, by bounds that are fixed before the first question.

A group-sequential test of the paired gain in the main metric, at the looks `LOOKS`:

- surely better: z at or above the bound of the alpha-spending function of Lan and DeMets
  (Biometrika 70, 1983) that resembles O'Brien and Fleming's, so that all looks together err as
  rarely as one test of all questions; and every other limit of the gate holds, those on greedy
  answers tightened in proportion to the questions asked.
- hardly better any more: the probability of passing the last bound is below 20 %, even if the
  gain were the one that all questions show with a power of 90 % (stochastic curtailment, Lan,
  Simon and Halperin 1982). It promotes nothing, so it needs no alpha.
- forgotten: the ability set shows it, whatever the answers are.

`python -m benchmarks.gate.campaign` measures what this saves, and what it costs;
`benchmarks.gate.sequential` simulates nights near the threshold.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache

from qwen3ft.config import TrainingConfig
from qwen3ft.evaluation.answers import Question, choose_questions
from qwen3ft.evaluation.gate import GatePolicy, decide_promotion
from qwen3ft.evaluation.scoring import run_checks
from qwen3ft.records.evaluation import Champion, Comparison, InferenceReport
from qwen3ft.records.model import SavedAdapter

LOOKS = (0.25, 0.5, 1.0)
"""Shares of the questions after which the verdict is looked at."""

POWER, LEAST_CONDITIONAL_POWER = 0.9, 0.2


@dataclass(frozen=True)
class Look:
    """One part of the questions; it has nearly all of the part before.

    Attributes:
        rows: Indices of the questions.
        share: Share of all questions.
        bound: z from which the candidate is surely better.
        confidence: Level of the intervals at every look: that of the last bound.
    """

    rows: list[int]
    share: float
    bound: float
    confidence: float


def plan_looks(config: TrainingConfig, questions: Sequence[Question], metric: str) -> list[Look]:
    """Return the looks; a single one where stopping early is off, or the questions are few.

    A loss needs no answers, so where it is the main metric there is nothing to save.
    """
    whole = list(range(len(questions)))
    # Of fewer, the one odd answer that the gate forgives is too large a share.
    few = LOOKS[0] * len(questions) < 3 * config.gate_min_rows
    if not config.stop_asking_early or few or metric == "answer_loss":
        return [Look(whole, 1.0, 0.0, config.gate_confidence)]
    limits = bounds(LOOKS, (1 - config.gate_confidence) / 2)
    confidence = 1 - 2 * _upper_tail(limits[-1])
    parts = [choose_questions(questions, round(share * len(questions))) for share in LOOKS]
    return [
        Look(rows, share, bound, confidence)
        for rows, share, bound in zip(parts, LOOKS, limits, strict=True)
    ]


def settled(
    look: Look,
    report: InferenceReport,
    saved: SavedAdapter,
    champion: Champion | None,
    policy: GatePolicy,
) -> str:
    """Return why no further question can be expected to change the verdict; '' to go on."""
    base, candidate = report.score("base"), report.score("candidate")
    if base and candidate and base.ability_loss is not None and candidate.ability_loss is not None:
        rise = candidate.ability_loss - base.ability_loss
        if rise > policy.max_ability_loss_rise:
            return "it forgets, whatever it answers"
    compared = [one for one in report.comparisons if one.metric == report.main_metric]
    if not compared:
        return ""
    lowest = min(z_of(one, look.confidence) for one in compared)
    last = _quantile((1 - look.confidence) / 2)
    if conditional_power(lowest, look.share, last) < LEAST_CONDITIONAL_POWER:
        return f"hardly to become better any more (z {lowest:.2f})"
    if lowest < look.bound or candidate is None:
        return ""
    if not all(run_checks(candidate, differs=True, share=look.share).values()):
        return ""
    strict = policy.model_copy(
        update={
            name: look.share * getattr(policy, name)
            for name in ("max_score_loss", "max_form_loss", "max_answer_loss_rise")
        }
    )
    verdict = decide_promotion(report, saved, champion=champion, policy=strict)
    if verdict.decision != "promoted":
        return ""
    return f"surely better (z {lowest:.2f}, bound {look.bound:.2f})"


def z_of(comparison: Comparison, confidence: float) -> float:
    """Return the gain in standard errors, as its interval implies; infinite without any spread."""
    width = comparison.high - comparison.low
    if width <= 0:
        return math.copysign(math.inf, comparison.gain) if comparison.gain else 0.0
    return 2 * _quantile((1 - confidence) / 2) * comparison.gain / width


@cache
def bounds(shares: tuple[float, ...], alpha: float) -> tuple[float, ...]:
    """Return the bound of z at each look, so that all together reject one-sided with `alpha`.

    The distribution of all z is multivariate normal (Armitage, McPherson and Rowe 1969).
    """
    import numpy as np
    from scipy.optimize import brentq
    from scipy.stats import multivariate_normal

    found: list[float] = []
    for count in range(1, len(shares) + 1):
        times = np.array(shares[:count])
        covariance = np.sqrt(np.minimum.outer(times, times) / np.maximum.outer(times, times))
        normal = multivariate_normal(cov=covariance, seed=0, abseps=1e-7)
        below = 1 - spent(shares[count - 1], alpha)

        def excess(bound: float, normal: object = normal, below: float = below) -> float:
            return float(normal.cdf([*found, bound])) - below  # type: ignore[attr-defined]

        found.append(float(brentq(excess, 0.5, 9.0, xtol=1e-4)))
    return tuple(found)


def spent(share: float, alpha: float) -> float:
    """Return the alpha that may be spent up to this share of the questions."""
    return 2 * _upper_tail(_quantile(alpha / 2) / math.sqrt(share))


def conditional_power(z: float, share: float, last_bound: float) -> float:
    """Return the probability of passing the last bound under the design's gain.

    With z at this share of the questions, B = z sqrt(share) (Lan and Wittes 1988).
    """
    drift = last_bound + _quantile(1 - POWER)
    needed = last_bound - z * math.sqrt(share) - drift * (1 - share)
    return _upper_tail(needed / math.sqrt(1 - share))


def _upper_tail(z: float) -> float:
    from scipy.stats import norm

    return float(norm.sf(z))


def _quantile(tail: float) -> float:
    from scipy.stats import norm

    return float(norm.isf(tail))
