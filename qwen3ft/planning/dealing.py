"""Deal the micro-batches of an optimizer step to the ranks so that all finish at the same time.

A function of lengths and shapes alone: every rank computes the same deal, and so does a run that
continues. The ranks' GPUs are of one kind, so only proportions between times matter.
"""

from __future__ import annotations

import heapq
from collections.abc import Callable, Sequence
from itertools import pairwise

from qwen3ft.planning.packing import pack, round_up, rows_at_a_time
from qwen3ft.planning.speed import PRODUCT_SHARE, attention_share
from qwen3ft.planning.workload import workload_of
from qwen3ft.records.model import ModelShape
from qwen3ft.records.plan import TrainPlan

Split = Callable[[list[int]], list[list[int]]]
"""Maps the lengths of a step's sequences to positions among them, one list per micro-batch."""


def split_of(plan: TrainPlan) -> Split:
    """Return the function that splits a step of `plan` into the micro-batches of all ranks."""
    ranks = plan.ranks
    if plan.memory.packing:
        capacity = workload_of(plan).capacity_tokens
        return lambda lengths: pack(lengths, capacity, ranks)
    most = plan.memory.micro_batch_size
    if ranks == 1:
        return lambda lengths: rows_at_a_time(lengths, most)
    return lambda lengths: _even(len(lengths), round_up(-(-len(lengths) // most), ranks))


def _even(rows: int, groups: int) -> list[list[int]]:
    """Group neighbours as evenly as whole rows can be, none of them empty."""
    bounds = [rows * group // groups for group in range(groups + 1)]
    return [list(range(*ends)) for ends in pairwise(bounds) if ends[0] < ends[1]]


def split_for_rank(plan: TrainPlan, rank: int) -> Split:
    """Return the function that splits a step of `plan` into the micro-batches of one rank.

    A rank may get none, where a step has fewer sequences than there are ranks.
    """
    split, shape, packing = split_of(plan), plan.model.shape, plan.memory.packing

    def split_own(lengths: list[int]) -> list[list[int]]:
        groups = split(lengths)
        costs = []
        for group in groups:
            tokens = [lengths[position] for position in group]
            costs.append(cost(shape, tokens if packing else [max(tokens)] * len(tokens)))
        return [groups[index] for index in deal(costs, plan.ranks)[rank]]

    return split_own


def cost(shape: ModelShape, lengths: Sequence[int]) -> float:
    """Return the predicted time of a micro-batch, in units of one token's products.

    A token takes 2 operations per linear weight, and causal attention 2 per query feature, layer
    and token of the sequence (twice 2, over half of it on average); `planning.speed` has the rates.
    """
    features = shape.query_features * shape.num_hidden_layers
    linear = shape.linear_parameters / PRODUCT_SHARE
    return sum(
        tokens * (1 + features * tokens / attention_share(tokens) / linear) for tokens in lengths
    )


def deal(costs: Sequence[float], ranks: int) -> list[list[int]]:
    """Give the dearest first to the rank with the least so far (LPT; Graham 1969).

    Returns:
        Positions in `costs` of each rank, ascending; of equals the first goes to the lowest rank.
    """
    hands: list[list[int]] = [[] for _ in range(ranks)]
    loads = [(0.0, rank) for rank in range(ranks)]
    for index in sorted(range(len(costs)), key=lambda index: (-costs[index], index)):
        load, rank = loads[0]
        hands[rank].append(index)
        heapq.heapreplace(loads, (load + costs[index], rank))
    return [sorted(hand) for hand in hands]
