"""Which sequences share a micro-batch: the plan of an epoch, from lengths alone.

An effective batch is what one optimizer step sees. Its sequences are packed one after the other
into rows of at most `capacity_tokens`, so that (nearly) no slot is padding and as few micro-batches
as possible are run: each one pays for dequantising all weights and for every kernel launch.

Guarantees: pure and deterministic; no sequence is split, left out or repeated; no micro-batch is
over the capacity. Which sequences share an optimizer step, and their order, depends on seed and
epoch alone, never on the capacity, so a run that continues with another one sees the same effective
batches. Fewest possible micro-batches is bin packing, which is NP-hard: there are never more than
best-fit decreasing needs. Not covered: what a row looks like, which is `qwen3ft.training.batches`.
"""

from __future__ import annotations

import bisect
import heapq
import math
from collections.abc import Iterable, Iterator, Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

ROW_MULTIPLE_TOKENS = 32
"""Packed rows are padded to a multiple of this: tensor cores and attention masks want 8 or 16, and
fewer different shapes are cheaper."""

Lengths = Sequence[int] | NDArray[np.integer]
"""Tokens of each sequence, shape (sequences,)."""


class WorstCase(NamedTuple):
    """The extremes of a plan; what memory has to be there for."""

    micro_batch_tokens: int
    """Most tokens of any micro-batch, before its row is padded."""
    row_tokens: int
    """The same, as it is run: a multiple of `ROW_MULTIPLE_TOKENS`."""
    sequence_tokens: int
    """The longest sequence."""
    micro_batches: int
    """Micro-batches in all."""
    micro_batches_per_step: int
    """Most micro-batches of any optimizer step."""


def pack(lengths: Lengths, capacity_tokens: int) -> list[list[int]]:
    """Group sequences into micro-batches of at most `capacity_tokens`, few and of like size.

    For k = ceil(tokens / capacity) micro-batches and upwards: the longest sequence first into the
    least filled one (LPT; Graham 1969, doi:10.1137/0117039), which balances best; where that does
    not fit, best-fit decreasing under the smallest capacity found by bisection (MULTIFIT; Coffman,
    Garey and Johnson 1978, doi:10.1137/0207001).

    Args:
        lengths: Tokens of each sequence, all at least 1.
        capacity_tokens: Most tokens of a micro-batch.

    Returns:
        Positions in `lengths`, ascending in each micro-batch; the micro-batches by their first.
        There are at most as many as best-fit decreasing makes, so at most 11/9 of the fewest
        possible + 6/9 (Dosa 2007, doi:10.1007/978-3-540-74450-4_1).

    Raises:
        ValueError: a sequence is longer than the capacity, or empty.
    """
    tokens = [int(length) for length in lengths]
    if not tokens:
        return []
    if max(tokens) > capacity_tokens or min(tokens) < 1:
        raise ValueError(
            f"Sequences of {min(tokens)} to {max(tokens)} tokens do not fit micro-batches of "
            f"{capacity_tokens}: each must have 1 to {capacity_tokens}."
        )
    longest_first = sorted(range(len(tokens)), key=lambda index: (-tokens[index], index))
    count = -(-sum(tokens) // capacity_tokens)
    while True:
        groups = _least_filled(tokens, longest_first, count, capacity_tokens)
        groups = groups or _multifit(tokens, longest_first, count, capacity_tokens)
        if groups is not None:
            return sorted(sorted(group) for group in groups)
        count += 1


def rows_at_a_time(lengths: Lengths, micro_batch_size: int) -> list[list[int]]:
    """The plain twin of `pack`: neighbours, `micro_batch_size` sequences each, to be padded."""
    positions = list(range(len(lengths)))
    return [
        positions[start : start + micro_batch_size]
        for start in range(0, len(positions), micro_batch_size)
    ]


def epoch_order(
    lengths: Lengths, effective_batch_size: int, seed: int, epoch: int
) -> Iterator[NDArray[np.int64]]:
    """The effective batches of an epoch, as row numbers: shuffled by (seed, epoch) alone.

    Which rows share an optimizer step is random; within it rows of like length stand together,
    longest first, so that padded micro-batches carry little padding and memory peaks early. The
    last batch holds what is left. NumPy's RandomState is used because its stream is frozen (NEP
    19): a run that continues after an upgrade sees the same order.
    """
    tokens = np.asarray(lengths)
    bits = np.random.MT19937(np.random.SeedSequence((seed, epoch)))
    order = np.random.RandomState(bits).permutation(len(tokens)).astype(np.int64)
    for start in range(0, len(order), effective_batch_size):
        batch = order[start : start + effective_batch_size]
        yield batch[np.lexsort((batch, -tokens[batch]))]


def epoch_batches(
    lengths: Lengths, effective_batch_size: int, capacity_tokens: int, seed: int, epoch: int
) -> Iterator[list[list[int]]]:
    """Each optimizer step of an epoch as its packed micro-batches of row numbers.

    Known before any row is read: `lengths` is all it takes. Made one step at a time.

    Raises:
        ValueError: as `pack`, at the step that holds the sequence.
    """
    tokens = np.asarray(lengths)
    for batch in epoch_order(tokens, effective_batch_size, seed, epoch):
        groups = pack(tokens[batch].tolist(), capacity_tokens)
        yield [[int(batch[position]) for position in group] for group in groups]


def worst_case(lengths: Lengths, steps: Iterable[Sequence[Sequence[int]]]) -> WorstCase:
    """The extremes of `steps`, as `epoch_batches` gives them; all zero where there are none."""
    most_tokens = longest = most_micro_batches = micro_batches = 0
    for step in steps:
        micro_batches += len(step)
        most_micro_batches = max(most_micro_batches, len(step))
        for rows in step:
            tokens = [int(lengths[row]) for row in rows]
            most_tokens = max(most_tokens, sum(tokens))
            longest = max(longest, *tokens)
    return WorstCase(
        most_tokens, row_tokens(most_tokens), longest, micro_batches, most_micro_batches
    )


def divisors(number: int) -> list[int]:
    """Divisors, largest first."""
    small = [size for size in range(1, math.isqrt(number) + 1) if number % size == 0]
    return sorted({*small, *(number // size for size in small)}, reverse=True)


def row_tokens(tokens: int, multiple: int = ROW_MULTIPLE_TOKENS) -> int:
    """`tokens` rounded up to a multiple of `multiple`: the slots of a packed row."""
    return -(-tokens // multiple) * multiple


def _least_filled(
    tokens: Sequence[int], longest_first: Sequence[int], count: int, capacity_tokens: int
) -> list[list[int]] | None:
    """Longest processing time first into `count` groups; None if one would be over capacity."""
    groups: list[list[int]] = [[] for _ in range(count)]
    filled = [(0, group) for group in range(count)]
    for index in longest_first:
        total, group = filled[0]
        total += tokens[index]
        if total > capacity_tokens:
            return None
        groups[group].append(index)
        heapq.heapreplace(filled, (total, group))
    return [group for group in groups if group]


def _multifit(
    tokens: Sequence[int], longest_first: Sequence[int], count: int, capacity_tokens: int
) -> list[list[int]] | None:
    """Best-fit decreasing into at most `count` groups, as level as bisection finds them."""
    best = _best_fit(tokens, longest_first, capacity_tokens)
    if len(best) > count:
        return None
    low = max(tokens[longest_first[0]], -(-sum(tokens) // count))
    high = capacity_tokens
    while low < high:
        middle = (low + high) // 2
        groups = _best_fit(tokens, longest_first, middle)
        if len(groups) <= count:
            best, high = groups, middle
        else:
            low = middle + 1
    return best


def _best_fit(
    tokens: Sequence[int], longest_first: Sequence[int], capacity_tokens: int
) -> list[list[int]]:
    """Each sequence into the fullest group that has room for it, else into a new one."""
    groups: list[list[int]] = []
    room: list[tuple[int, int]] = []  # (tokens left, group), ascending
    for index in longest_first:
        place = bisect.bisect_left(room, (tokens[index], -1))
        if place == len(room):
            left, group = capacity_tokens, len(groups)
            groups.append([])
        else:
            left, group = room.pop(place)
        groups[group].append(index)
        bisect.insort(room, (left - tokens[index], group))
    return groups
