"""Micro-batches are dealt so that ranks finish together, and every sequence is dealt once."""

from __future__ import annotations

from random import Random
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from qwen3ft.model.shapes import find_shape
from qwen3ft.planning.dealing import cost, deal, split_for_rank, split_of
from qwen3ft.planning.packing import pack

LENGTHS = st.lists(st.integers(1, 64), max_size=40)


@given(LENGTHS, st.integers(1, 9))
def test_a_packed_step_has_as_many_micro_batches_for_each_rank(
    lengths: list[int], ranks: int
) -> None:
    """Each sequence once, within the capacity; for one rank what it was."""
    groups = pack(lengths, 64, ranks)
    assert sorted(index for group in groups for index in group) == list(range(len(lengths)))
    assert all(sum(lengths[index] for index in group) <= 64 for group in groups)
    if ranks == 1:
        assert groups == pack(lengths, 64)
    hands = deal([1.0] * len(groups), ranks)
    assert max(map(len, hands)) - min(map(len, hands)) <= 1


@given(st.lists(st.floats(0.1, 100), max_size=60), st.integers(1, 9))
def test_a_deal_is_complete_and_close_to_even(costs: list[float], ranks: int) -> None:
    """No rank has more than the mean and the dearest: Graham's bound for any list order."""
    hands = deal(costs, ranks)
    assert sorted(index for hand in hands for index in hand) == list(range(len(costs)))
    loads = [sum(costs[index] for index in hand) for hand in hands]
    assert max(loads) <= sum(costs) / ranks + max(costs, default=0) + 1e-9
    assert deal(costs, ranks) == hands


@pytest.mark.parametrize("packing", [False, True])
@pytest.mark.parametrize("ranks", [1, 2, 3, 4, 7])
def test_ranks_share_a_step_of_any_size(make_plan: Any, packing: bool, ranks: int) -> None:
    """Together the micro-batches of the step, and none twice, also with fewer rows than ranks."""
    plan = make_plan(packing=packing, micro_batch_size=4, places=tuple(range(ranks)))
    random = Random(ranks)
    for rows in (1, 2, 5, 16, 64):
        lengths = [random.randint(1, 40) for _ in range(rows)]
        shares = [split_for_rank(plan, rank)(lengths) for rank in range(ranks)]
        assert sorted(group for share in shares for group in share) == sorted(
            split_of(plan)(lengths)
        )
        if rows >= 16:
            assert all(shares)


def test_long_sequences_are_dearer_than_their_tokens() -> None:
    """Attention grows with the square: 8 x 1,024 tokens of 4B cost less than 1 x 8,192."""
    _, shape = find_shape("4b")
    short, long = cost(shape, [1024] * 8), cost(shape, [8192])
    assert 8192 < short < long < 4 * short
