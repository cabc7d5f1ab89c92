"""Simulates nights near the threshold: what stopping early saves there, and what it costs.

    python -m benchmarks.gate.sequential [--questions 600] [--repeats 400]

The looks and bounds are those of `qwen3ft.evaluation.sequential`. Candidate and rival share four
answers of five; each question is drawn anew. `benchmarks.gate.campaign` measures the same with real
candidates, most of which are far from the threshold.
"""

from __future__ import annotations

import argparse
import math

import numpy as np

from benchmarks.machine import machine
from qwen3ft.evaluation.sequential import (
    LEAST_CONDITIONAL_POWER,
    LOOKS,
    bounds,
    conditional_power,
)

ALPHA = 0.025
"""One-sided, as the lower bound of a two-sided 95 % interval."""

DIFFERING = 0.2
"""Share of the questions on which candidate and rival differ."""

GAINS_IN_POINTS = (-2, 0, 1, 2, 3, 4, 5, 7)


def decide(gains: np.ndarray, looks: tuple[float, ...]) -> tuple[bool, int]:
    """Return (promoted, questions asked) of one simulated night.

    Args:
        gains: (questions,): differences in exact match, in the order of asking.
        looks: Fractions of the questions.
    """
    limits = bounds(looks, ALPHA)
    for share, bound in zip(looks, limits, strict=True):
        seen = gains[: round(share * len(gains))]
        z = float(seen.mean() / max(seen.std(), 1e-9)) * math.sqrt(len(seen))
        if share < 1 and conditional_power(z, share, limits[-1]) < LEAST_CONDITIONAL_POWER:
            return False, len(seen)
        if z >= bound:
            return True, len(seen)
    return False, len(gains)


def simulate(
    gain: float, questions: int, repeats: int, looks: tuple[float, ...]
) -> tuple[float, float]:
    """Return (share promoted, mean share of the questions asked) at this true gain."""
    draw = np.random.default_rng(1)
    better = (DIFFERING + gain) / 2
    promoted, asked = 0, 0
    for _ in range(repeats):
        drawn = draw.random(questions)
        gains = np.where(drawn < better, 1.0, np.where(drawn < DIFFERING, -1.0, 0.0))
        won, count = decide(gains, looks)
        promoted += won
        asked += count
    return promoted / repeats, asked / repeats / questions


def main() -> None:
    """Print a line for each true gain."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--questions", type=int, default=600)
    parser.add_argument("--repeats", type=int, default=400)
    asked = parser.parse_args()
    print(f"{machine()['date']}, {asked.questions} questions, {asked.repeats} repeats")
    print(f"looks at {LOOKS}, bounds of z {[round(bound, 2) for bound in bounds(LOOKS, ALPHA)]}")
    print(f"{'gain, points':16}{'promoted: fixed':>18}{'sequential':>12}{'asked':>8}")
    for points in GAINS_IN_POINTS:
        fixed, _ = simulate(points / 100, asked.questions, asked.repeats, (1.0,))
        won, share = simulate(points / 100, asked.questions, asked.repeats, LOOKS)
        print(f"{points:>+7}{fixed:>25.1%}{won:>13.1%}{share:>9.0%}")


if __name__ == "__main__":
    main()
