"""Find the worst batches that a run will put on the device, from lengths alone.

They are batches that training and its evaluations really run, by the same sampler; of equals the
first is taken. Not covered: steps beyond `MOST_SEQUENCES`, and rows that were prepared again after
recovery shortened them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from functools import cache
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from qwen3ft.planning.fused_sizes import FusedSizes
from qwen3ft.planning.packing import Lengths, row_tokens
from qwen3ft.planning.workload import workload_of
from qwen3ft.records.plan import TrainPlan
from qwen3ft.records.preflight import WorstBatch, WorstBatches
from qwen3ft.training.batches import EffectiveBatchOrder, step_sampler

MOST_SEQUENCES = 1_000_000
"""Number of sequences whose steps are looked at, which takes some seconds."""

MOST_TOKENS = "most tokens"
LONGEST_ROW = "longest row"
MOST_MEMORY = "most memory of its blocks"

Rank = Callable[[int, Sequence[int]], tuple[int, ...]]
"""Maps the slots of a batch and its lengths to what is compared; the largest is the worst."""


def find_worst(
    plan: TrainPlan, train: Lengths, dev: Lengths, *, most_sequences: int = MOST_SEQUENCES
) -> WorstBatches:
    """Return the worst micro-batches of `plan` and the worst batches of its evaluations.

    Args:
        plan: The plan of the attempt.
        train: Tokens of each training row.
        dev: Tokens of each held-out row.
        most_sequences: Sequences whose steps are looked at; at least one step is.
    """
    order = EffectiveBatchOrder(train, plan.effective_batch_size, plan.seed)
    sampler = step_sampler(order, plan)
    in_time = max(1, most_sequences // plan.effective_batch_size)
    steps = left = min(plan.total_steps, in_time)
    search = _Search(
        order.lengths, _ranks(plan), packed=plan.memory.packing, graphs=plan.memory.graphs
    )
    accumulates = False
    while left > 0:
        for step in sampler:
            accumulates |= len(step) > 1
            search.look_at(step)
            left -= 1
            if left == 0:
                break
        order.epoch += 1
    return WorstBatches(
        train=search.found(),
        evaluate=_worst_of_evaluation(plan, np.asarray(dev)),
        accumulates=accumulates,
        steps_looked_at=steps,
    )


def read_lengths(plan: TrainPlan) -> tuple[NDArray[np.int32], NDArray[np.int32]]:
    """Return the tokens of each training row and each held-out row, from the plan's data."""
    folder = Path(plan.dataset.path)
    return _column(folder / "train.arrow"), _column(folder / "dev.arrow")


def _column(path: Path) -> NDArray[np.int32]:
    import pyarrow as pa

    with pa.memory_map(str(path)) as source, pa.ipc.open_stream(source) as reader:
        parts = [np.zeros(0, np.int32)]  # batch by batch, so that no token is touched
        parts += [batch.column("length").to_numpy() for batch in reader]
        return np.concatenate(parts)


def _ranks(plan: TrainPlan) -> dict[str, Rank]:
    """Return the measures by which a micro-batch can be the worst, by name."""
    ranks: dict[str, Rank] = {
        MOST_TOKENS: lambda slots, lengths: (slots, max(lengths)),
        LONGEST_ROW: lambda slots, lengths: (max(lengths), slots),
    }
    if plan.memory.kernels == "fused":
        # A smaller row keeps more of its blocks, and FlashAttention's backward pads each sequence,
        # so it may take more than the largest one.
        work = workload_of(plan)
        planned = FusedSizes(work)

        @cache
        def bytes_of(slots: int, sequences: int) -> int:
            levels = planned.levels(slots, plan.memory.activation_bytes)
            return FusedSizes(work, sequences).row_bytes(slots, levels)

        def most_memory(slots: int, lengths: Sequence[int]) -> tuple[int, int]:
            # padding is a sequence, too
            return bytes_of(slots, len(lengths) + (slots > sum(lengths))), slots

        ranks[MOST_MEMORY] = most_memory
    return ranks


def _worst_of_evaluation(plan: TrainPlan, dev: NDArray[np.integer]) -> tuple[WorstBatch, ...]:
    """Return the worst evaluation batches, full ones first."""
    starts = range(0, len(dev), plan.memory.eval_batch_size)
    ranks = _ranks(plan)
    ranks.pop(MOST_MEMORY, None)  # nothing of a block is kept, and there is no backward
    search = _Search(dev, ranks, packed=plan.memory.kernels == "fused", graphs=plan.memory.graphs)
    search.look_at(
        list(range(start, min(start + plan.memory.eval_batch_size, len(dev)))) for start in starts
    )
    # The evaluation splits the chosen rows into full batches again, so a shorter one comes last.
    return tuple(sorted(search.found(), key=lambda batch: -len(batch.rows)))


class _Search:
    """Worst batch in each respect of all batches looked at."""

    def __init__(
        self,
        lengths: NDArray[np.integer],
        ranks: dict[str, Rank],
        *,
        packed: bool,
        graphs: bool,
    ) -> None:
        self.lengths = lengths
        self.ranks = ranks
        self.packed = packed
        self.graphs = graphs
        self.worst: dict[str, tuple[tuple[int, ...], list[int]]] = {}

    def look_at(self, batches: Iterable[list[int]]) -> None:
        for rows in batches:
            tokens = self.lengths[rows].tolist()
            slots = self._slots(tokens)
            for name, rank in self.ranks.items():
                value = rank(slots, tokens)
                if name not in self.worst or value > self.worst[name][0]:
                    self.worst[name] = value, rows

    def found(self) -> tuple[WorstBatch, ...]:
        """Return each batch once, with every respect in which it is the worst."""
        chosen: dict[tuple[int, ...], list[str]] = {}
        for name, (_, rows) in self.worst.items():
            chosen.setdefault(tuple(rows), []).append(name)
        return tuple(self._describe(rows, names) for rows, names in chosen.items())

    def _describe(self, rows: tuple[int, ...], names: list[str]) -> WorstBatch:
        tokens = self.lengths[list(rows)].tolist()
        return WorstBatch(
            chosen_for=tuple(names), rows=rows, lengths=tuple(tokens), slots=self._slots(tokens)
        )

    def _slots(self, tokens: list[int]) -> int:
        if not self.packed:
            return len(tokens) * max(tokens)
        return row_tokens(sum(tokens), graphs=self.graphs)
