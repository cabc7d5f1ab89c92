"""Packing: which sequences share a micro-batch, and where rows are packed."""

from __future__ import annotations

import itertools
import math
import random
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from support.plans import TINY, plan_for, workload, workload_lengths

from qwen3ft.errors import InsufficientMemoryError
from qwen3ft.planning.packing import epoch_order, pack, row_tokens, rows_at_a_time
from qwen3ft.planning.plan import repredict
from qwen3ft.planning.workload import workload_of
from qwen3ft.training.batches import EffectiveBatchOrder, StepSampler

LENGTHS = st.lists(st.integers(1, 60), min_size=1, max_size=40)


def epoch_batches(
    lengths: list[int], effective: int, capacity: int, seed: int, epoch: int
) -> Iterator[list[list[int]]]:
    """Each optimizer step as its packed micro-batches of row numbers."""
    for batch in epoch_order(lengths, effective, seed, epoch):
        groups = pack([lengths[row] for row in batch], capacity)
        yield [[int(batch[position]) for position in group] for group in groups]


def fewest(lengths: list[int], capacity: int) -> int:
    """The fewest micro-batches possible, by trying every assignment."""
    for count in range(1, len(lengths) + 1):
        for homes in itertools.product(range(count), repeat=len(lengths)):
            totals = [0] * count
            for length, home in zip(lengths, homes, strict=True):
                totals[home] += length
            if max(totals) <= capacity:
                return count
    raise AssertionError


@given(lengths=LENGTHS, spare=st.integers(0, 200))
def test_packing_loses_splits_and_overfills_nothing(lengths: list[int], spare: int) -> None:
    """A partition within the capacity, in the order given, and the same every time."""
    capacity = max(lengths) + spare
    groups = pack(lengths, capacity)
    assert sorted(itertools.chain(*groups)) == list(range(len(lengths)))
    assert all(groups)
    assert all(group == sorted(group) for group in groups)
    assert groups == sorted(groups)
    assert all(sum(lengths[index] for index in group) <= capacity for group in groups)
    assert pack(np.array(lengths, dtype=np.int32), capacity) == groups


@given(lengths=st.lists(st.integers(1, 20), min_size=1, max_size=6), spare=st.integers(0, 25))
def test_packing_needs_hardly_more_than_the_fewest_micro_batches(
    lengths: list[int], spare: int
) -> None:
    """Within the bound of best-fit decreasing, 11/9 of the optimum + 6/9, found by brute force."""
    capacity = max(lengths) + spare
    assert len(pack(lengths, capacity)) <= 11 / 9 * fewest(lengths, capacity) + 6 / 9


def test_packing_takes_fewer_where_balancing_alone_would_not_fit() -> None:
    """Longest first into the least filled needs 3 micro-batches of 10 here; 2 are enough."""
    assert pack([5, 5, 4, 3, 3], 10) == [[0, 1], [2, 3, 4]]


@pytest.mark.parametrize("capacity", [1024, 2048, 4096, 8192, 16384])
def test_micro_batches_of_a_step_are_as_few_and_as_level_as_can_be(capacity: int) -> None:
    """The least that the tokens allow, or one more; the fullest within 3 % of their mean."""
    for seed in range(20):
        lengths = workload_lengths(64, seed)
        groups = pack(lengths, capacity)
        tokens = [sum(lengths[index] for index in group) for group in groups]
        least = -(-sum(lengths) // capacity)
        assert least <= len(groups) <= least + 1
        assert max(tokens) <= 1.03 * sum(tokens) / len(tokens)


def test_a_sequence_over_the_capacity_is_refused() -> None:
    """It would have to be split; an empty one has nothing to train."""
    with pytest.raises(ValueError, match="33 tokens do not fit micro-batches of 32"):
        pack([3, 33], 32)
    with pytest.raises(ValueError, match="0 to 3 tokens"):
        pack([3, 0], 32)
    assert pack([], 32) == []


@given(
    lengths=st.lists(st.integers(1, 50), min_size=1, max_size=120),
    effective=st.integers(1, 32),
    capacities=st.tuples(st.integers(50, 400), st.integers(50, 400)),
    seed=st.integers(0, 2**31 - 1),
    epoch=st.integers(0, 99),
)
def test_effective_batches_do_not_depend_on_the_capacity(
    lengths: list[int], effective: int, capacities: tuple[int, int], seed: int, epoch: int
) -> None:
    """Another capacity splits the same effective batches; an epoch holds each row once."""
    wanted = [batch.tolist() for batch in epoch_order(lengths, effective, seed, epoch)]
    assert sorted(itertools.chain(*wanted)) == list(range(len(lengths)))
    assert all(len(batch) == effective for batch in wanted[:-1])
    for capacity in capacities:
        steps = list(epoch_batches(lengths, effective, capacity, seed, epoch))
        assert [sorted(itertools.chain(*step)) for step in steps] == [sorted(b) for b in wanted]
        for step, batch in zip(steps, wanted, strict=True):
            place = {row: index for index, row in enumerate(batch)}
            assert all(rows == sorted(rows, key=place.__getitem__) for rows in step)


def test_order_depends_on_seed_and_epoch_only() -> None:
    """Each epoch is a permutation, the longest row of a batch first; pinned for old checkpoints."""
    lengths = [5, 9, 3, 7, 8, 2, 6, 4, 1, 10]
    order = EffectiveBatchOrder(lengths, effective_batch_size=4, seed=3)
    first = list(order)
    assert first == PINNED
    assert sorted(first) == list(range(10))
    for batch in order.batches():
        assert [lengths[row] for row in batch] == sorted((lengths[r] for r in batch), reverse=True)
    order.epoch = 1
    assert list(order) != first
    assert list(EffectiveBatchOrder(lengths, 4, seed=4)) != first


PINNED = [9, 1, 0, 5, 4, 7, 2, 8, 3, 6]


def test_the_sampler_gives_what_the_plan_said() -> None:
    """Packed micro-batches of each effective batch; padded ones hold neighbours."""
    lengths = workload_lengths(200)
    order = EffectiveBatchOrder(lengths, 64, seed=5)
    order.epoch = 2
    sampler = StepSampler(order, lambda tokens: pack(tokens, 1024))
    assert list(sampler) == list(epoch_batches(lengths, 64, 1024, seed=5, epoch=2))
    assert len(sampler) == len(list(sampler)) == 4
    padded = list(StepSampler(order, lambda tokens: rows_at_a_time(tokens, 5)))
    assert [len(step) for step in padded] == [13, 13, 13, 2]
    assert list(itertools.chain(*itertools.chain(*padded))) == list(order)


def test_a_row_is_padded_to_a_multiple_and_by_less_than_one() -> None:
    """Tensor cores and masks want that."""
    for tokens in (1, 31, 32, 33, 4095):
        assert row_tokens(tokens) % 32 == 0
        assert tokens <= row_tokens(tokens) < tokens + 32


def test_rows_with_graphs_have_few_lengths_and_little_padding() -> None:
    """Each length is recorded once, and each slot is computed."""
    for least in (1024, 2048, 4096, 8192):
        slots = {tokens: row_tokens(tokens, graphs=True) for tokens in range(least, 2 * least)}
        assert all(tokens <= slots[tokens] <= tokens + max(128, tokens // 16) for tokens in slots)
        assert len(set(slots.values())) <= 17


@pytest.mark.parametrize(
    ("asked", "gpu_gb", "expected"),
    [("auto", 16.0, True), ("auto", None, False), ("on", None, True), ("off", 16.0, False)],
)
def test_the_plan_packs_on_a_gpu_or_where_asked(
    asked: str, gpu_gb: float | None, expected: bool
) -> None:
    """And says why; a packed plan is predicted to take no less than its padded twin."""
    plan = plan_for(TINY, gpu_gb=gpu_gb, packing=asked)
    assert plan.memory.packing is expected
    assert plan.reasons["packing"]
    assert workload_of(plan).capacity_tokens >= plan.dataset.train.longest_tokens
    padded = repredict(plan.with_settings(packing=False))
    packed = repredict(plan.with_settings(packing=True))
    assert packed.predicted_peak_bytes >= padded.predicted_peak_bytes


def test_long_rows_that_fit_padded_alone_are_not_refused() -> None:
    """Where the mask of a packed row is what does not fit, 'auto' falls back to padded rows."""
    long: Any = {"longest_tokens": 16384, "max_sequence_length": 16384, "max_memory_gb": 8.1}
    plan = plan_for(**long)
    assert not plan.memory.packing
    assert "does not fit" in plan.reasons["packing"]
    with pytest.raises(InsufficientMemoryError, match="packed attention mask"):
        plan_for(**long, packing="on")


@pytest.mark.parametrize("micro_batch_size", [1, 2, 8])
@pytest.mark.parametrize("sigma", [0.3, 0.6, 0.8])
def test_rows_hold_no_more_sequences_than_a_plan_expects(
    micro_batch_size: int, sigma: float
) -> None:
    """Of steps of drawn lengths, also where few fit a row and one takes the shortest."""
    draw = random.Random(f"{micro_batch_size} {sigma}")
    steps = []
    for _ in range(40):
        lengths = (draw.lognormvariate(math.log(96), sigma) for _ in range(64))
        steps.append([int(min(256, max(8, length))) for length in lengths])
    mean = -(-sum(map(sum, steps)) // (64 * len(steps)))
    levers: dict[str, Any] = {"kernels": "fused", "packing": True}
    work = workload(micro_batch_size=micro_batch_size, typical_tokens=mean, **levers)
    most = max(len(row) for step in steps for row in pack(step, work.capacity_tokens))
    assert most + 1 <= work.row_sequences
