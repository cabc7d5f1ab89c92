"""Simulates a gate that stops asking early: questions saved, and what its promise costs.

    python -m benchmarks.gate.sequential [--questions 600] [--repeats 400] [--looks 4]

Design, fixed in advance: K equally spaced looks at the paired difference in exact match between
candidate and each rival.

- Better: z at or above the bound of the alpha-spending function of Lan and DeMets (Biometrika 70,
  1983) that resembles O'Brien and Fleming's, one-sided alpha 0.025; bounds by recursive integration
  (Armitage, McPherson and Rowe 1969), here with the multivariate normal distribution.
- Not better: the conditional power to pass the last bound, if the gain were the one that the full
  test finds with a power of 90 %, is below 20 % (stochastic curtailment, Lan, Simon and Halperin
  1982). It never promotes anything, so it needs no alpha.
- Kept whatever follows: losses are measured first, without answers; and more answers have failed a
  check of form than the limit allows for all questions.

Candidates are those of the stored campaign: their shares, drawn anew for each question as
independent Bernoulli numbers (real pairs are correlated, which makes differences clearer). The
second table has nights near the threshold: base and candidate share most answers.
"""

from __future__ import annotations

import argparse
import json
import math
from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np
from scipy.optimize import brentq
from scipy.stats import multivariate_normal, norm

from benchmarks.gate.campaign import MAX_ABILITY_LOSS_RISE
from benchmarks.machine import ROOT, machine
from qwen3ft.evaluation.gate import GatePolicy

ALPHA = 0.025
"""One-sided, as the lower bound of a two-sided 95 % interval."""

POWER, LEAST_CONDITIONAL_POWER = 0.9, 0.2
CHAMPION_EXACT_MATCH = 0.4
LEAST_SAVED = 0.3
"""Share of the questions that early stopping has to save to be worth building."""

STORED = ROOT / "benchmarks/results/gate-cpu.json"
LIMITS = GatePolicy(max_ability_loss_rise=MAX_ABILITY_LOSS_RISE)


def spent(fraction: float) -> float:
    """Return the alpha that may be spent up to this fraction of the questions."""
    return float(2 * norm.sf(norm.isf(ALPHA / 2) / math.sqrt(fraction)))


@cache
def bounds(fractions: tuple[float, ...]) -> tuple[float, ...]:
    """Return the bound of z at each look, so that all looks together reject with `ALPHA`."""
    found: list[float] = []
    for count in range(1, len(fractions) + 1):
        times = np.array(fractions[:count])
        covariance = np.sqrt(np.minimum.outer(times, times) / np.maximum.outer(times, times))
        wanted = 1 - spent(fractions[count - 1])

        def beyond(bound: float, covariance: Any = covariance, wanted: float = wanted) -> float:
            stays = multivariate_normal.cdf([*found, bound], cov=covariance, rng=0, abseps=1e-7)
            return float(stays) - wanted

        found.append(float(brentq(beyond, 0.5, 8.0, xtol=1e-4)))
    return tuple(found)


def conditional_power(z: float, fraction: float, last_bound: float) -> float:
    """Return the probability of passing the last bound, under the design's gain."""
    drift = last_bound + float(norm.ppf(POWER))
    needed = last_bound - z * math.sqrt(fraction) - drift * (1 - fraction)
    return float(norm.sf(needed / math.sqrt(1 - fraction)))


@dataclass(frozen=True)
class Candidate:
    """A candidate of the stored campaign, as shares."""

    good: bool
    exact_match: float
    rivals: tuple[float, ...]
    failing: float
    """Share of answers that fail the check which most of them fail."""
    objection: bool
    """Losses, sampled answers or other scores keep it out, whatever its greedy answers."""
    known_before: bool
    """So do losses alone."""


def stored_candidates(*, champion: bool) -> list[Candidate]:
    """Return the candidates as of a first night, or beside a champion."""
    entries = json.loads(STORED.read_text(encoding="utf-8"))["candidates"][1:]
    return [_candidate(entry, champion=champion) for entry in entries]


def _candidate(entry: dict[str, Any], *, champion: bool) -> Candidate:
    mine, base = entry["candidate"], entry["base"]
    reasons = entry["beside_champion" if champion else "first_night"][1:]
    losses = ("it forgets", "answer loss")
    others = ("sampled answers", "token F1", "chrF")
    return Candidate(
        good=entry["night"].startswith("good"),
        exact_match=mine["exact_match"],
        rivals=(base["exact_match"], *([CHAMPION_EXACT_MATCH] if champion else [])),
        failing=max(base["form"][check] - share for check, share in mine["form"].items()),
        objection=any(reason.startswith(losses) for reason in reasons)
        or any(word in reason for reason in reasons for word in others),
        known_before=any(reason.startswith(losses) for reason in reasons),
    )


def decide(
    gains: np.ndarray, failed: np.ndarray, candidate: Candidate, looks: tuple[float, ...]
) -> tuple[bool, int]:
    """Return (promoted, questions asked) of one simulated night.

    Args:
        gains: (rivals, questions): differences in exact match, in the order of asking.
        failed: (questions,): True where the answer fails a check of form.
        candidate: The rest of what the gate looks at.
        looks: Fractions of the questions.
    """
    total = gains.shape[1]
    if candidate.known_before:
        return False, 0
    limits = bounds(looks)
    for fraction, bound in zip(looks, limits, strict=True):
        asked = round(fraction * total)
        seen = gains[:, :asked]
        spread = np.maximum(seen.std(axis=1), 1e-9)
        scores = seen.mean(axis=1) / spread * math.sqrt(asked)
        failures = int(failed[:asked].sum())
        if failures > LIMITS.max_form_loss * total + 1:
            return False, asked
        well_formed = failures <= max(LIMITS.max_form_loss * asked, 1)
        if bool((scores >= bound).all()) and (well_formed or fraction == 1):
            return well_formed and not candidate.objection, asked
        if fraction < 1:
            powers = [conditional_power(float(z), fraction, limits[-1]) for z in scores]
            if min(powers) < LEAST_CONDITIONAL_POWER:
                return False, asked
    return False, total


def simulate(
    candidate: Candidate, questions: int, repeats: int, looks: tuple[float, ...], seed: int
) -> tuple[float, float]:
    """Return (share promoted, mean share of the questions asked)."""
    draw = np.random.default_rng(seed)
    promoted, asked = 0, 0
    for _ in range(repeats):
        mine = draw.random(questions) < candidate.exact_match
        theirs = [draw.random(questions) < share for share in candidate.rivals]
        gains = np.array([mine.astype(float) - other for other in theirs])
        failed = draw.random(questions) < candidate.failing
        won, count = decide(gains, failed, candidate, looks)
        promoted += won
        asked += count
    return promoted / repeats, asked / repeats / questions


def near_threshold(
    gain: float, questions: int, repeats: int, looks: tuple[float, ...]
) -> tuple[float, float]:
    """Return the same for a gain over one rival, where one answer in five differs."""
    draw = np.random.default_rng(1)
    better, candidate = (0.2 + gain) / 2, Candidate(True, 0, (0,), 0.0, False, False)
    promoted, asked = 0, 0
    for _ in range(repeats):
        drawn = draw.random(questions)
        gains = np.where(drawn < better, 1.0, np.where(drawn < 0.2, -1.0, 0.0))[None]
        won, count = decide(gains, np.zeros(questions, bool), candidate, looks)
        promoted += won
        asked += count
    return promoted / repeats, asked / repeats / questions


def main() -> None:
    """Print both tables and the verdict on building it."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--questions", type=int, default=600)
    parser.add_argument("--repeats", type=int, default=400)
    parser.add_argument("--looks", type=int, default=4)
    asked = parser.parse_args()
    looks = tuple((index + 1) / asked.looks for index in range(asked.looks))
    print(f"{machine()['date']}, {asked.questions} questions, {asked.repeats} repeats")
    print(f"looks at {looks}, bounds of z {[round(bound, 2) for bound in bounds(looks)]}")
    print(
        f"{'night':16}{'plan':12}{'bad promoted':>14}{'good kept':>12}{'asked: good':>13}{'bad':>7}"
    )
    shares = []
    for champion in (False, True):
        for name, plan in (("fixed", (1.0,)), ("sequential", looks)):
            found = [
                (each.good, *simulate(each, asked.questions, asked.repeats, plan, seed))
                for seed, each in enumerate(stored_candidates(champion=champion))
            ]
            good, bad = ([one for one in found if one[0] is kind] for kind in (True, False))
            bad_promoted, kept = sum(b for _, b, _ in bad), sum(1 - g for _, g, _ in good)
            asks = [float(np.mean([share for _, _, share in of])) for of in (good, bad)]
            if name == "sequential":
                shares.append(float(np.mean([share for _, _, share in found])))
            print(
                f"{'champion' if champion else 'first':16}{name:12}"
                f"{bad_promoted:>9.2f} of {len(bad)}{kept:>7.2f} of {len(good)}"
                f"{asks[0]:>10.0%}{asks[1]:>10.0%}"
            )
    print(f"\n{'gain, points':16}{'promoted: fixed':>18}{'sequential':>12}{'asked':>8}")
    for points in (-2, 0, 1, 2, 3, 4, 5, 7):
        fixed, _ = near_threshold(points / 100, asked.questions, asked.repeats, (1.0,))
        won, share = near_threshold(points / 100, asked.questions, asked.repeats, looks)
        print(f"{points:>+7}{fixed:>25.1%}{won:>13.1%}{share:>9.0%}")
    saved = 1 - max(shares)
    worth = "worth building" if saved >= LEAST_SAVED else "left out"
    print(f"\nsaved over the campaign: at least {saved:.0%} of the questions ({worth})")


if __name__ == "__main__":
    main()
