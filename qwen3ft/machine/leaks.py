"""Leak detection: tell memory that keeps growing from memory that goes up and down.

Pure numbers in, numbers out; `qwen3ft.training.leak_watch` feeds it while training. One series
(resident memory, or tensors on a GPU) is read at the same point of each step. Readings are grouped
into blocks, and the lowest of each block counts. The last `BLOCKS` blocks are kept at widths of 4,
8, 16, ... readings, so that slow, fast and late leaks are found with memory that is logarithmic in
the length of the run. `growth_slope` holds the criteria.

Simulated on 30 series of 4,000 readings of each kind: no false alarm for a level with normal noise
of 1 to 64 MiB (also autocorrelated at 0.9), spikes of 500 MiB in 5 % of readings, a sawtooth of
40 MiB with a period of 10 to 47, or one shift of 200 MiB; 3 of 30 for random walks with steps of
0.3 MiB. A leak of 1 MiB a step is reported within 80 readings and one of 100 KiB within 350, in
noise of up to 4 MiB (`tests/machine/test_leaks.py`).

A report may turn out wrong later: a sawtooth with a period above 48 readings, and a level that is
approached slowly, do grow for a while. Not covered: growth that uses up the budget within 48
readings (an out-of-memory error), growth below 16 MiB in all, and swapped memory.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import combinations
from statistics import median
from typing import NamedTuple

from qwen3ft.errors import MemoryLeakError
from qwen3ft.units import GIB, MIB

READINGS_PER_BLOCK = 4
BLOCKS = 12
SMALLEST_GROWTH_BYTES = 16 * MIB
LEAST_SIGNAL_TO_NOISE = 8.0
LEAST_SHARE_OF_A_HALF = 0.4  # steady growth has 0.5 in each half, one shift 0 in one of them
LEAST_NEW_GROUND = 0.5
_DEVIATIONS_PER_MAD = 1.4826  # standard deviation of a normal distribution over its MAD

GROWTH_LIMIT_BYTES = 8 * GIB
"""Growth that ends an attempt however much memory is left, because other processes need it."""

LAST_STEPS = 20
"""End the attempt when the rest of the budget lasts for fewer steps than these."""


class Low(NamedTuple):
    """Lowest reading of a block."""

    used_bytes: int
    step: int


@dataclass(frozen=True)
class Growth:
    """Memory that keeps growing, from `since_step` to `step`."""

    series: str
    """The series that grows, in words."""
    bytes_per_step: float
    """Present slope."""
    since_step: int
    step: int
    grown_bytes: int

    @property
    def mib_per_1000_steps(self) -> float:
        """Slope in the unit of the messages."""
        return 1000 * self.bytes_per_step / MIB

    def steps_until_full(self, left_bytes: int) -> int:
        """Return the number of optimizer steps that `left_bytes` last for."""
        return int(max(0, left_bytes) / self.bytes_per_step)


class LeakDetector:
    """Detector for one series of readings.

    Args:
        series: What is read, in words: 'resident memory'.
        warm_up_steps: First steps to ignore: lazy imports, first caches, first gradients.
    """

    def __init__(self, series: str, *, warm_up_steps: int = 10) -> None:
        self.series = series
        self.warm_up_steps = warm_up_steps
        self.restart()

    def restart(self) -> None:
        """Forget all readings, after a clean-up gave back what had grown."""
        self._first_step: int | None = None
        self._block: list[Low] = []
        self._widths: list[_Width] = []
        self._since: Low | None = None
        self._growth: Growth | None = None

    def add(self, step: int, used_bytes: int) -> bool:
        """Add the reading at the end of `step`; True if it completed a block, which was judged."""
        if self._first_step is None:
            self._first_step = step
        if step - self._first_step < self.warm_up_steps:
            return False
        self._block.append(Low(used_bytes, step))
        if len(self._block) < READINGS_PER_BLOCK:
            return False
        # The minimum drops evaluation spikes, and sawteeth of garbage collection within a block.
        low, self._block = min(self._block), []
        self._push(low)
        self._judge(low)
        return True

    @property
    def growth(self) -> Growth | None:
        """Growth as of the last complete block; None while there is none."""
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
        # Widest first: the longest window has the most accurate slope.
        for width in reversed(self._widths):
            if (slope := growth_slope(tuple(width.lows), width.highest_before)) is not None:
                self._since = self._since or width.lows[0]
                grown = newest.used_bytes - self._since.used_bytes
                self._growth = Growth(self.series, slope, self._since.step, newest.step, grown)
                return
        self._since = self._growth = None


@dataclass
class _Width:
    """The last blocks of one width, and half of the next block of twice the width."""

    lows: deque[Low] = field(default_factory=lambda: deque(maxlen=BLOCKS))
    highest_before: int | None = None
    _half: Low | None = None

    def push(self, low: Low) -> Low | None:
        """Add a block; return the block of twice the width if this completes one."""
        if len(self.lows) == BLOCKS:
            self.highest_before = max(self.highest_before or 0, self.lows[0].used_bytes)
        self.lows.append(low)
        half, self._half = self._half, low if self._half is None else None
        return None if half is None else min(half, low)


def growth_slope(lows: Sequence[Low], highest_before: int | None) -> float | None:
    """Return the slope in bytes a step if `lows` keep growing, else None.

    Args:
        lows: `BLOCKS` blocks of one width, oldest first; with fewer there is no verdict.
        highest_before: Highest block before these; None if there was none.
    """
    if len(lows) < BLOCKS:
        return None
    slope = theil_sen([(low.step, low.used_bytes) for low in lows])
    growth = slope * (lows[-1].step - lows[0].step)
    # Less is harmless, and heaps take that long to settle.
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
    # A level that shifts once grows in one half only.
    if min(second - first, last - second) < LEAST_SHARE_OF_A_HALF * (last - first):
        return None
    # A later tooth of a saw only regains the level of the one before it.
    if highest_before is not None:
        new_ground = lows[-1].used_bytes - highest_before
        if new_ground < LEAST_NEW_GROUND * growth:
            return None
    return slope


def theil_sen(points: Sequence[tuple[float, float]]) -> float:
    """Return the median slope over all pairs of (x, y) points of different x; 0 if there are none.

    Robust to 29 % of outliers (Sen 1968).
    """
    # scipy.stats.theilslopes takes 50 times as long for 12 points (270 against 6 microseconds), and
    # importing it 1 s, which training would wait for.
    slopes = [(y2 - y1) / (x2 - x1) for (x1, y1), (x2, y2) in combinations(points, 2) if x2 != x1]
    return median(slopes) if slopes else 0.0


# --- consequences of growth ---


def ends_early(growth: Growth, left_bytes: int, steps_to_end: int) -> bool:
    """Return True if the budget or `GROWTH_LIMIT_BYTES` is exceeded before the run ends."""
    limit_left = GROWTH_LIMIT_BYTES - growth.grown_bytes
    return growth.steps_until_full(min(left_bytes, limit_left)) < steps_to_end


def must_stop(
    growth: Growth, left_bytes: int, steps_to_end: int, *, margin_bytes: int, steps_between: int
) -> bool:
    """Return True if the attempt should save a checkpoint and end now.

    Args:
        growth: Result of the detector.
        left_bytes: Rest of the budget.
        steps_to_end: Optimizer steps until the run ends.
        margin_bytes: Memory that saving may take.
        steps_between: Steps between two readings.
    """
    # As late as is safe: early stopping may end the run first, and attempts are limited.
    if not ends_early(growth, left_bytes, steps_to_end):
        return False
    last_steps = max(LAST_STEPS, 2 * steps_between)
    return (
        growth.grown_bytes >= GROWTH_LIMIT_BYTES
        or growth.steps_until_full(left_bytes - margin_bytes) < last_steps
    )


def describe(growth: Growth, left_bytes: int) -> str:
    """Return the growth in one sentence."""
    return (
        f"{growth.series[0].upper()}{growth.series[1:]} grows by "
        f"{growth.mib_per_1000_steps:,.1f} MiB per 1,000 steps since step {growth.since_step} "
        f"({growth.grown_bytes / MIB:,.0f} MiB so far); {left_bytes / MIB:,.0f} MiB of the budget "
        f"are left, enough for {growth.steps_until_full(left_bytes):,} steps."
    )


def leak_error(growth: Growth, left_bytes: int, step: int) -> MemoryLeakError:
    """Return the error that ends an attempt at `step` because of `growth`."""
    return MemoryLeakError(
        describe(growth, left_bytes),
        why="Something keeps references, or a library does not free memory; a fresh process starts "
        "clean.",
        next_command="qwen3ft doctor",
        series=growth.series,
        mib_per_1000_steps=round(growth.mib_per_1000_steps, 3),
        since_step=growth.since_step,
        step=step,
        grown_mib=round(growth.grown_bytes / MIB, 1),
        left_mib=round(left_bytes / MIB, 1),
        steps_until_full=growth.steps_until_full(left_bytes),
    )
