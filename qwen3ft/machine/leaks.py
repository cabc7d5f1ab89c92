"""Tells memory that keeps growing from memory that goes up and down. Pure: numbers in, numbers out.

How it decides. Readings of one series (resident memory, or tensors on a GPU), taken at the same
point of a step, are put into blocks; of each block the lowest reading counts, so that spikes of
evaluations, and the teeth of garbage collection and caches that are shorter than a block, are gone.
The last 12 blocks are kept at every width of 4, 8, 16, ... readings, so that a leak is seen however
fast it is and whenever it starts, in memory that grows with the logarithm of the run's length. A
width tells of growth where, over its 12 blocks,

- the Theil-Sen slope (the median over all pairs) gives at least `SMALLEST_GROWTH_BYTES`: less
  harms nobody, and heaps take that long to settle;
- that is 8 times the noise (median absolute deviation from the line, as a standard deviation);
- each half has at least 40 % of it, by the medians of thirds: a level that shifts has not;
- it is new ground: half of it is above every block before these 12, as no later tooth of a saw is.

What that gives, by simulation of 30 series of 4,000 readings of each kind: none was told as growth
of those that were flat with normal noise of 1 to 64 MiB, also with a correlation of 0.9 from one
reading to the next, had spikes of 500 MiB in 5 % of readings, teeth of 40 MiB every 10 to 47, or a
shift of 200 MiB; of random walks with steps of 0.3 MiB, 3 of 30. A leak of 1 MiB a step is told
within 80 readings and one of 100 KiB within 350, in noise of up to 4 MiB
(`tests/machine/test_leaks.py`). A reading is a step, unless steps are so short that reading them
all would cost too much.

What is told may end: a first tooth of more than 48 readings, and a level that is approached slowly,
do grow while they do. That is why `qwen3ft.training.leak_watch` cleans up before it believes, and
ends an attempt only near the end of its budget. Not covered: growth so fast that the budget is gone
before 48 readings (an out-of-memory error, and answered as one); less than 16 MiB in all; swapped
memory.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import combinations
from statistics import median
from typing import NamedTuple

from qwen3ft.errors import MemoryLeakError
from qwen3ft.units import GIB

MIB = 2**20

READINGS_PER_BLOCK = 4
BLOCKS = 12
SMALLEST_GROWTH_BYTES = 16 * MIB
LEAST_SIGNAL_TO_NOISE = 8.0
LEAST_SHARE_OF_A_HALF = 0.4
LEAST_NEW_GROUND = 0.5
_DEVIATIONS_PER_MAD = 1.4826  # of a normal distribution

GROWTH_LIMIT_BYTES = 8 * GIB
"""Growth of this much ends an attempt, however much is left: it is taken from others."""

LAST_STEPS = 20
"""An attempt ends when what is left of the budget lasts for fewer steps than these."""


class Low(NamedTuple):
    """The lowest reading of a block."""

    used_bytes: int
    step: int


@dataclass(frozen=True)
class Growth:
    """Memory that keeps growing.

    Attributes:
        series: What grows, in words.
        bytes_per_step: The slope now.
        since_step: Where it was first on its way.
        step: Where it was seen last.
        grown_bytes: From `since_step` to `step`.
    """

    series: str
    bytes_per_step: float
    since_step: int
    step: int
    grown_bytes: int

    @property
    def mib_per_1000_steps(self) -> float:
        """The slope in the unit that leaks are told in."""
        return 1000 * self.bytes_per_step / MIB

    def steps_until_full(self, left_bytes: int) -> int:
        """Optimizer steps that `left_bytes` last for."""
        return int(max(0, left_bytes) / self.bytes_per_step)


class LeakDetector:
    """Watches one series of readings.

    Args:
        series: What is read, in words: 'resident memory'.
        warm_up_steps: Steps that are not looked at: lazy imports, first caches, first gradients.
    """

    def __init__(self, series: str, *, warm_up_steps: int = 10) -> None:
        self.series = series
        self.warm_up_steps = warm_up_steps
        self.restart()

    def restart(self) -> None:
        """Forget everything: memory was given back, so what grew was no leak."""
        self._first_step: int | None = None
        self._block: list[Low] = []
        self._widths: list[_Width] = []
        self._since: Low | None = None
        self._growth: Growth | None = None

    def add(self, step: int, used_bytes: int) -> bool:
        """Take a reading at the end of `step`; whether a block is complete and was judged."""
        if self._first_step is None:
            self._first_step = step
        if step - self._first_step < self.warm_up_steps:
            return False
        self._block.append(Low(used_bytes, step))
        if len(self._block) < READINGS_PER_BLOCK:
            return False
        low, self._block = min(self._block), []
        self._push(low)
        self._judge(low)
        return True

    @property
    def growth(self) -> Growth | None:
        """What the last complete block told; None while nothing keeps growing."""
        return self._growth

    def _push(self, low: Low) -> None:
        for index in range(len(self._widths) + 1):
            if index == len(self._widths):
                self._widths.append(_Width())
            wider = self._widths[index].push(low)
            if wider is None:
                return
            low = wider

    def _judge(self, newest: Low) -> None:
        """The widest view that tells of growth has the surest slope."""
        for width in reversed(self._widths):
            if (slope := growth_slope(tuple(width.lows), width.highest_before)) is not None:
                self._since = self._since or width.lows[0]
                grown = newest.used_bytes - self._since.used_bytes
                self._growth = Growth(self.series, slope, self._since.step, newest.step, grown)
                return
        self._since = self._growth = None


@dataclass
class _Width:
    """The last blocks of one width, and the half of the next wider one."""

    lows: deque[Low] = field(default_factory=lambda: deque(maxlen=BLOCKS))
    highest_before: int | None = None
    _half: Low | None = None

    def push(self, low: Low) -> Low | None:
        """Add a block; the block of twice the width that it completes, if it does."""
        if len(self.lows) == BLOCKS:
            self.highest_before = max(self.highest_before or 0, self.lows[0].used_bytes)
        self.lows.append(low)
        half, self._half = self._half, low if self._half is None else None
        return None if half is None else min(half, low)


def growth_slope(lows: Sequence[Low], highest_before: int | None) -> float | None:
    """Bytes a step where `lows` keep growing; None where they do not, by the rules above."""
    if len(lows) < BLOCKS:
        return None
    slope = theil_sen([(low.step, low.used_bytes) for low in lows])
    growth = slope * (lows[-1].step - lows[0].step)
    if growth < SMALLEST_GROWTH_BYTES:
        return None
    offsets = [low.used_bytes - slope * low.step for low in lows]
    middle = median(offsets)
    noise = _DEVIATIONS_PER_MAD * median(abs(offset - middle) for offset in offsets)
    if growth < LEAST_SIGNAL_TO_NOISE * noise:
        return None
    third = len(lows) // 3
    first, second, last = (
        median(low.used_bytes for low in lows[start : start + third])
        for start in range(0, 3 * third, third)
    )
    if min(second - first, last - second) < LEAST_SHARE_OF_A_HALF * (last - first):
        return None
    if highest_before is not None:
        new_ground = lows[-1].used_bytes - highest_before
        if new_ground < LEAST_NEW_GROUND * growth:
            return None
    return slope


def theil_sen(points: Sequence[tuple[float, float]]) -> float:
    """The median slope over all pairs of points of different x; 0 if there are none.

    Up to 29 % of the points may be anything without moving it far (Sen 1968).
    """
    slopes = [(y2 - y1) / (x2 - x1) for (x1, y1), (x2, y2) in combinations(points, 2) if x2 != x1]
    return median(slopes) if slopes else 0.0


# --- what follows from growth ---


def ends_early(growth: Growth, left_bytes: int, steps_to_end: int) -> bool:
    """Whether the budget is gone, or the absolute limit passed, before the run ends."""
    limit_left = GROWTH_LIMIT_BYTES - growth.grown_bytes
    return growth.steps_until_full(min(left_bytes, limit_left)) < steps_to_end


def must_stop(
    growth: Growth, left_bytes: int, steps_to_end: int, *, margin_bytes: int, steps_between: int
) -> bool:
    """Whether an attempt should save and end now.

    It goes on as long as it can, since early stopping may end the run first, and each fresh
    process is one of a few attempts.

    Args:
        growth: What was seen.
        left_bytes: Of the budget.
        steps_to_end: Of the run.
        margin_bytes: What saving may take.
        steps_between: Steps from one reading to the next.
    """
    if not ends_early(growth, left_bytes, steps_to_end):
        return False
    last_steps = max(LAST_STEPS, 2 * steps_between)
    return (
        growth.grown_bytes >= GROWTH_LIMIT_BYTES
        or growth.steps_until_full(left_bytes - margin_bytes) < last_steps
    )


def describe(growth: Growth, left_bytes: int) -> str:
    """The growth in one sentence."""
    return (
        f"{growth.series[0].upper()}{growth.series[1:]} grows by "
        f"{growth.mib_per_1000_steps:,.1f} MiB per 1,000 steps since step {growth.since_step} "
        f"({growth.grown_bytes / MIB:,.0f} MiB so far); {left_bytes / MIB:,.0f} MiB of the budget "
        f"are left, for {growth.steps_until_full(left_bytes):,} steps."
    )


def leak_error(growth: Growth, left_bytes: int, step: int) -> MemoryLeakError:
    """The error that ends an attempt at `step` because of `growth`."""
    return MemoryLeakError(
        describe(growth, left_bytes),
        why="Something keeps references, or a library does not free; a fresh process starts clean.",
        next_command="qwen3ft doctor",
        series=growth.series,
        mib_per_1000_steps=round(growth.mib_per_1000_steps, 3),
        since_step=growth.since_step,
        step=step,
        grown_mib=round(growth.grown_bytes / MIB, 1),
        left_mib=round(left_bytes / MIB, 1),
        steps_until_full=growth.steps_until_full(left_bytes),
    )
