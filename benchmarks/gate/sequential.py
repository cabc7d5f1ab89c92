"""Simulates a gate that stops asking early: questions saved, and what its promise costs.

    python -m benchmarks.gate.sequential [--questions 600] [--repeats 400]

The design is that of `qwen3ft.evaluation.sequential`, with its looks and bounds. Candidates are
those of the stored campaign: their shares, drawn anew for each question as independent Bernoulli
numbers (real pairs are correlated, which makes differences clearer). The second table has nights
near the threshold: base and candidate share four answers of five.
"""

from __future__ import annotations

import argparse
import json
import math
from dataclasses import dataclass
from typing import Any

import numpy as np

from benchmarks.gate.campaign import MAX_ABILITY_LOSS_RISE
from benchmarks.machine import ROOT, machine
from qwen3ft.evaluation.gate import GatePolicy
from qwen3ft.evaluation.sequential import (
    LEAST_CONDITIONAL_POWER,
    LOOKS,
    bounds,
    conditional_power,
)

ALPHA = 0.025
"""One-sided, as the lower bound of a two-sided 95 % interval."""

CHAMPION_EXACT_MATCH = 0.4
LEAST_SAVED = 0.3
"""Share of the questions that early stopping has to save to be worth building."""

STORED = ROOT / "benchmarks/results/gate-cpu.json"
LIMITS = GatePolicy(max_ability_loss_rise=MAX_ABILITY_LOSS_RISE)


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
    forgets: bool
    """The ability set alone keeps it out."""


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
        forgets=any(reason.startswith("it forgets") for reason in reasons),
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
    limits = bounds(looks, ALPHA)
    for share, bound in zip(looks, limits, strict=True):
        asked = round(share * total)
        if candidate.forgets:
            return False, asked
        seen = gains[:, :asked]
        spread = np.maximum(seen.std(axis=1), 1e-9)
        lowest = float((seen.mean(axis=1) / spread).min()) * math.sqrt(asked)
        if share < 1 and conditional_power(lowest, share, limits[-1]) < LEAST_CONDITIONAL_POWER:
            return False, asked
        allowed = max(share * LIMITS.max_form_loss, 1 / asked + 1e-9)
        if lowest >= bound and failed[:asked].mean() <= allowed and not candidate.objection:
            return True, asked
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
    asked = parser.parse_args()
    looks = LOOKS
    print(f"{machine()['date']}, {asked.questions} questions, {asked.repeats} repeats")
    print(f"looks at {looks}, bounds of z {[round(bound, 2) for bound in bounds(looks, ALPHA)]}")
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
