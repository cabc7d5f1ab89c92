"""Long lists of texts in parts that are bounded in number and in size."""

from __future__ import annotations

from collections.abc import Iterator, Sequence


def spans(sizes: Sequence[int], most_items: int, most_size: int) -> Iterator[tuple[int, int]]:
    """Yield (start, end) of parts of a list, in order; none is empty.

    Args:
        sizes: Size of each item.
        most_items: Items in a part.
        most_size: Sum of the sizes in a part of more than one item.
    """
    start = size = 0
    for at, own in enumerate(sizes):
        if at > start and (at - start == most_items or size + own > most_size):
            yield start, at
            start, size = at, 0
        size += own
    if sizes:
        yield start, len(sizes)
