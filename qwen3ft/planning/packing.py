"""Pack the sequences of an optimizer step into micro-batches, from their lengths alone.

The sequences of a step are laid one after the other into rows of at most `capacity_tokens`, with
nearly no padding. No sequence is split, left out or repeated. Which sequences share a step, and
their order, depends on seed and epoch alone, never on the capacity, so a run that continues with
another capacity sees the same steps. `qwen3ft.training.batches` builds the rows.
"""

from __future__ import annotations

import bisect
import heapq
import math
from collections.abc import Iterator, Sequence

import numpy as np
from numpy.typing import NDArray

ROW_MULTIPLE_TOKENS = 32
"""Multiple of tokens that packed rows are padded to: tensor cores and attention masks need 8 or 16,
and fewer different shapes are cheaper."""

LEAST_GRAPH_MULTIPLE_TOKENS, GRAPH_LENGTHS = 128, 16
"""The same where rows run as CUDA graphs, of which each length has its own: more for long rows, so
that at most 16 lengths lie between one and twice as much. About 2 % of rows over 2,048 tokens are
padding."""

LEAST_GRAPH_BOUNDS = 16
"""Least bounds of the sequences of a row with graphs; the next are twice as many."""

Lengths = Sequence[int] | NDArray[np.integer]
"""Tokens of each sequence, shape (sequences,)."""


def pack(lengths: Lengths, capacity_tokens: int, ranks: int = 1) -> list[list[int]]:
    """Group sequences into few micro-batches of like size, of at most `capacity_tokens`.

    For k = ceil(tokens / capacity) micro-batches and upwards: the longest sequence first into the
    least filled one (LPT; Graham 1969, doi:10.1137/0117039), which balances best; where that does
    not fit, best-fit decreasing under the smallest capacity found by bisection (MULTIFIT; Coffman,
    Garey and Johnson 1978, doi:10.1137/0207001).

    Args:
        lengths: Tokens of each sequence, all at least 1.
        capacity_tokens: Most tokens of a micro-batch.
        ranks: Processes that share the step; each is to get as many micro-batches.

    Returns:
        Positions in `lengths`, ascending in each micro-batch; the micro-batches by their first.
        For one rank there are at most as many as best-fit decreasing makes, so at most 11/9 of the
        fewest possible + 6/9 (Dosa 2007, doi:10.1007/978-3-540-74450-4_1).

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
    count = round_up(-(-sum(tokens) // capacity_tokens), ranks)
    # Each micro-batch pays for dequantising all weights and for every kernel launch, so fewer are
    # better. The fewest possible is bin packing, which is NP-hard: count upwards with heuristics.
    while True:
        groups = _least_filled(tokens, longest_first, count, capacity_tokens)
        groups = groups or _multifit(tokens, longest_first, count, capacity_tokens)
        if groups is not None:
            return sorted(sorted(group) for group in groups)
        count += ranks


def rows_at_a_time(lengths: Lengths, micro_batch_size: int) -> list[list[int]]:
    """Group neighbours, `micro_batch_size` sequences each, to be padded instead of packed."""
    positions = list(range(len(lengths)))
    return [
        positions[start : start + micro_batch_size]
        for start in range(0, len(positions), micro_batch_size)
    ]


def epoch_order(
    lengths: Lengths, effective_batch_size: int, seed: int, epoch: int
) -> Iterator[NDArray[np.int64]]:
    """Yield the row numbers of each optimizer step of an epoch, shuffled by (seed, epoch) alone.

    Rows of a step are sorted by length, longest first. The last step holds what is left.
    """
    tokens = np.asarray(lengths)
    # The stream of NumPy's RandomState is frozen (NEP 19), so a run that continues after an upgrade
    # sees the same order.
    bits = np.random.MT19937(np.random.SeedSequence((seed, epoch)))
    order = np.random.RandomState(bits).permutation(len(tokens)).astype(np.int64)
    for start in range(0, len(order), effective_batch_size):
        batch = order[start : start + effective_batch_size]
        # Rows of like length stand together, so that padded micro-batches carry little padding;
        # the longest come first, so that memory peaks early.
        yield batch[np.lexsort((batch, -tokens[batch]))]


def divisors(number: int) -> list[int]:
    """Return the divisors of `number`, largest first."""
    small = [size for size in range(1, math.isqrt(number) + 1) if number % size == 0]
    return sorted({*small, *(number // size for size in small)}, reverse=True)


def row_tokens(tokens: int, *, graphs: bool = False) -> int:
    """Round `tokens` up to the slots of a packed row, of one that runs as CUDA graphs or not."""
    if not graphs:
        return round_up(tokens, ROW_MULTIPLE_TOKENS)
    half = next_power_of_2(tokens) // 2
    return round_up(tokens, max(LEAST_GRAPH_MULTIPLE_TOKENS, half // GRAPH_LENGTHS))


def row_bounds(sequences: int, *, graphs: bool = False) -> int:
    """Return the bounds of a row's sequences, of one that runs as CUDA graphs or not.

    Args:
        sequences: Number of them, of which padding is one.
        graphs: Round up to few numbers; bounds that a row lacks have no token.
    """
    bounds = sequences + 1
    return max(LEAST_GRAPH_BOUNDS, next_power_of_2(bounds)) if graphs else bounds


def next_power_of_2(number: int) -> int:
    """Return the smallest power of 2 that is not below `number`."""
    return 1 << max(0, number - 1).bit_length()


def round_up(number: int, multiple: int) -> int:
    """Return the smallest multiple of `multiple` that is not below `number`."""
    return -(-number // multiple) * multiple


def _least_filled(
    tokens: Sequence[int], longest_first: Sequence[int], count: int, capacity_tokens: int
) -> list[list[int]] | None:
    """Put the longest first into the least filled of `count` groups; None if one gets too full."""
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
    """Fill at most `count` groups best-fit decreasing, as evenly as bisection finds; else None."""
    best = _best_fit(tokens, longest_first, capacity_tokens)
    if len(best) > count:
        return None
    # No group can be smaller than the longest sequence or than an equal share.
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
    """Put each sequence into the fullest group that has room for it, else into a new one."""
    groups: list[list[int]] = []
    room: list[tuple[int, int]] = []  # (tokens left, group), ascending
    for index in longest_first:
        place = bisect.bisect_left(room, (tokens[index], -1))  # -1 is before every group's number
        if place == len(room):
            left, group = capacity_tokens, len(groups)
            groups.append([])
        else:
            left, group = room.pop(place)
        groups[group].append(index)
        bisect.insort(room, (left - tokens[index], group))
    return groups
