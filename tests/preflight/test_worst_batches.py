"""The worst batches of a run, found from lengths alone."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from support.preflights import BATCHES

from qwen3ft.planning.packing import row_tokens
from qwen3ft.preflight.worst_batches import _ranks, find_worst, read_lengths
from qwen3ft.records.plan import TrainPlan
from qwen3ft.training.batches import EffectiveBatchOrder, step_sampler


@pytest.fixture
def four(make_plan: Any) -> Callable[..., TrainPlan]:
    """A plan of micro-batches of four rows, four of them a step, over rows of up to 100 tokens."""

    def make(**changes: Any) -> TrainPlan:
        plan = make_plan()
        summary = plan.dataset.train.model_copy(update={"longest_tokens": 100})
        dataset = plan.dataset.model_copy(update={"train": summary})
        values = {"micro_batch_size": 4, "dataset": dataset, "eval_batch_size": 5}
        return plan.with_settings(**{**values, **changes})

    return make


@pytest.mark.parametrize("packing", [False, True])
@pytest.mark.parametrize("seed", [0, 2, 7])
def test_the_worst_micro_batch_is_the_worst_of_every_step_of_two_epochs(
    four: Any, packing: bool, seed: int
) -> None:
    """Brute force over what the sampler hands to the trainer finds none that is worse."""
    lengths = np.random.default_rng(seed).integers(3, 60, 150)
    # 10 steps an epoch: packed, with seeds 2 and 7, the second epoch has the worst micro-batch.
    plan = four(packing=packing, seed=seed, total_steps=20)
    order = EffectiveBatchOrder(lengths, plan.effective_batch_size, plan.seed)
    every: list[list[int]] = []
    for epoch in (0, 1):
        order.epoch = epoch
        every += [rows for step in step_sampler(order, plan) for rows in step]
    worst = find_worst(plan, lengths, lengths[:12])
    assert worst.steps_looked_at == 20
    by_name = {name: batch for batch in worst.train for name in batch.chosen_for}
    most, longest = by_name["most tokens"], by_name["longest row"]
    assert most.slots == max(_slots(lengths[rows], packing) for rows in every)
    with_longest = [rows for rows in every if lengths[rows].max() == lengths.max()]
    assert list(longest.rows) in with_longest
    assert longest.slots == max(_slots(lengths[rows], packing) for rows in with_longest)
    assert all(list(batch.rows) in every for batch in worst.train)


@pytest.mark.parametrize("seed", [1, 7])
def test_a_fused_plan_also_runs_the_row_that_takes_most(four: Any, seed: int) -> None:
    """Rows keep as much as fits, and pad each sequence: not the largest one may take most."""
    from qwen3ft.planning.fused_sizes import FusedSizes
    from qwen3ft.planning.workload import workload_of

    plan = four(
        kernels="fused", packing=True, chunk_tokens=1024, loss_chunk_tokens=16, total_steps=40
    )
    sizes = FusedSizes(workload_of(plan))
    room = sizes.row_bytes(288, sizes.levels(288, 2**40))  # all of 288 tokens, not of 400
    plan = plan.with_settings(activation_bytes=room)
    lengths = np.random.default_rng(seed).integers(4, 101, 150)
    order = EffectiveBatchOrder(lengths, plan.effective_batch_size, plan.seed)
    every = []
    while len(every) < plan.total_steps:
        every += [rows for step in step_sampler(order, plan) for rows in step]
        order.epoch += 1

    def taken(rows: Any) -> int:
        slots = _slots(lengths[list(rows)], True)
        sequences = len(rows) + (slots > lengths[list(rows)].sum())
        levels = sizes.levels(slots, room)
        return FusedSizes(workload_of(plan), sequences).row_bytes(slots, levels)

    worst = find_worst(plan, lengths, lengths)
    by_name = {name: batch for batch in worst.train for name in batch.chosen_for}
    most = by_name["most memory of its blocks"]
    assert most.slots < by_name["most tokens"].slots
    assert taken(most.rows) == max(taken(rows) for rows in every)
    rank = _ranks(plan)["most memory of its blocks"]
    assert rank(288, [18] * 16) > rank(288, [72] * 4)
    assert rank(256, [16] * 16) < rank(256, [15] * 16)  # whose padding is one more
    by_name = {name: batch for batch in worst.evaluate for name in batch.chosen_for}
    assert by_name.keys() == {"most tokens", "longest row"}


def test_the_worst_evaluation_batch_is_one_of_consecutive_rows(four: Any) -> None:
    """Its rows are padded to the longest one, and a shorter last batch stands last."""
    dev = np.array([9, 9, 9, 9, 9, 2, 2, 2, 2, 2, 60, 3])
    worst = find_worst(four(eval_batch_size=5), np.array([5] * 16), dev)
    most = {name: batch for batch in worst.evaluate for name in batch.chosen_for}
    assert most["most tokens"].slots == 120  # two rows, padded to 60
    assert most["most tokens"].rows == (10, 11)
    assert len(worst.evaluate[-1].rows) == 2
    assert find_worst(four(), np.array([5] * 16), np.array([], int)).evaluate == ()


def test_every_batch_runs_with_gradients_and_with_the_optimizers_state() -> None:
    """One micro-batch is run twice a step where steps have several, and every step twice."""
    assert BATCHES.steps() == (((3, 1), (3, 1)),) * 2
    other = BATCHES.train[0].model_copy(update={"rows": (8,)})
    both = BATCHES.model_copy(update={"train": (*BATCHES.train, other)})
    assert both.steps() == (((3, 1), (8,)),) * 2
    alone = both.model_copy(update={"accumulates": False})
    assert alone.steps() == (((3, 1),), ((8,),)) * 2


def test_long_runs_are_looked_at_up_to_a_limit(four: Any) -> None:
    """The limit is in sequences; a step is looked at in any case."""
    lengths = np.full(160, 10)
    for most, steps in ((64, 4), (1, 1)):
        found = find_worst(four(total_steps=500), lengths, lengths, most_sequences=most)
        assert found.steps_looked_at == steps


def test_lengths_are_read_without_the_rows(make_plan: Any, manifest: Any) -> None:
    """There are as many as rows, and their sum is the manifest's number of tokens."""
    train, dev = read_lengths(make_plan())
    assert (len(train), int(train.sum())) == (manifest.train.rows, manifest.train.tokens)
    assert (len(dev), int(dev.sum())) == (manifest.dev.rows, manifest.dev.tokens)


def _slots(tokens: Any, packed: bool) -> int:
    return row_tokens(int(tokens.sum())) if packed else len(tokens) * int(tokens.max())
