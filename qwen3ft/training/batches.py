"""What a micro-batch looks like, padded or packed, and how a step's micro-batches are fetched.

Guarantees: real tokens appear once and in order; padding carries no loss; no token is ever the
target of a token of another sequence. A step's rows are read when the step is due, so skipping to
the position of a resumed run reads none.

A packed row holds no attention mask: positions that start at 0 again are what tells transformers'
Qwen3 that a new sequence begins (`masking_utils.find_packed_sequence_indices`), which then makes
the block-diagonal causal mask, T x T of one byte each, itself. `tests/planning/test_packing.py`
holds that against each sequence alone. Importing this module imports no torch.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from qwen3ft.data.collators import IGNORED_LABEL, labels_of
from qwen3ft.planning.packing import (
    ROW_MULTIPLE_TOKENS,
    Lengths,
    epoch_order,
    pack,
    row_tokens,
    rows_at_a_time,
)
from qwen3ft.planning.workload import workload_of

if TYPE_CHECKING:
    from datasets import Dataset

    from qwen3ft.records.plan import TrainPlan


MicroBatch = dict[str, Any]
"""Tensors by name, as a collator gives them; a packed one has two plain numbers beside them."""


@dataclass(frozen=True)
class PackedCollator:
    """Makes one row of several sequences, one after the other, padded to a multiple.

    Padding stands at the end as a sequence of its own: it attends to itself alone, no other
    sequence attends to it, and it is a segment of `cu_seqlens`, so that a kernel for sequences of
    varying length leaves no slot undefined.
    """

    pad_token_id: int
    multiple: int = ROW_MULTIPLE_TOKENS

    def __call__(self, rows: Sequence[Mapping[str, Any]]) -> MicroBatch:
        """The row of T slots.

        Returns:
            `input_ids`, `labels` and `position_ids`: int64, shape (1, T). The label of the first
            token of a sequence is `IGNORED_LABEL`, whatever was trained.
            `cu_seqlens`: int32, shape (segments + 1,): where each segment starts, and T.
            `targets`: int64, shape (trained tokens,): the labels that are not `IGNORED_LABEL`; and
            `target_positions`: the slots that predict them, one before their own.
            `max_length`: tokens of the longest segment. `real_tokens`: slots that are no padding.
        """
        import torch

        lengths = [len(row["input_ids"]) for row in rows]
        real = sum(lengths)
        slots = row_tokens(real, self.multiple)
        segments = lengths + ([slots - real] if slots > real else [])
        bounds = np.concatenate(([0], np.cumsum(segments))).astype(np.int32)
        ids = np.full(slots, self.pad_token_id, dtype=np.int64)
        labels = np.full(slots, IGNORED_LABEL, dtype=np.int64)
        for row, start, length in zip(rows, bounds.tolist(), lengths, strict=False):
            ids[start : start + length] = row["input_ids"]
            labels[start : start + length] = labels_of(row)
        labels[bounds[:-1]] = IGNORED_LABEL
        positions = np.arange(slots, dtype=np.int64) - np.repeat(bounds[:-1], segments)
        arrays = {"input_ids": ids, "labels": labels, "position_ids": positions}
        trained = np.flatnonzero(labels != IGNORED_LABEL)
        return {
            **{name: torch.from_numpy(array)[None] for name, array in arrays.items()},
            "cu_seqlens": torch.from_numpy(bounds),
            "targets": torch.from_numpy(labels[trained]),
            "target_positions": torch.from_numpy(trained - 1),
            "max_length": max(segments),
            "real_tokens": real,
        }


def real_tokens(batch: Mapping[str, Any]) -> int:
    """Tokens of a micro-batch, padding not counted."""
    if "real_tokens" in batch:
        return int(batch["real_tokens"])
    return int(batch["attention_mask"].sum())


def trained_tokens(batch: Mapping[str, Any]) -> int:
    """Count the targets of a micro-batch: its labels without the first of each row."""
    return int((batch["labels"][:, 1:] != IGNORED_LABEL).sum())


class EffectiveBatchOrder:
    """Row numbers of one epoch, see `planning.packing.epoch_order`; the same for every capacity.

    Set `epoch` before iterating.
    """

    def __init__(self, lengths: Lengths, effective_batch_size: int, seed: int) -> None:
        self.lengths = np.asarray(lengths)
        self.effective_batch_size = effective_batch_size
        self.seed = seed
        self.epoch = 0

    def __len__(self) -> int:
        return len(self.lengths)

    def __iter__(self) -> Iterator[int]:
        for batch in self.batches():
            yield from batch.tolist()

    def batches(self) -> Iterator[NDArray[np.int64]]:
        """Row numbers of each effective batch."""
        return epoch_order(self.lengths, self.effective_batch_size, self.seed, self.epoch)


class StepSampler:
    """One item per optimizer step: the row numbers of each of its micro-batches.

    Stands where a `DataLoader` takes a batch sampler: what is skipped there is never fetched.

    Args:
        order: Which rows share a step.
        split: From the lengths of a step's rows to positions among them, a list a micro-batch.
    """

    def __init__(
        self, order: EffectiveBatchOrder, split: Callable[[list[int]], list[list[int]]]
    ) -> None:
        self.order = order
        self.split = split
        self.batch_size = order.effective_batch_size
        self.drop_last = False

    def __len__(self) -> int:
        return -(-len(self.order) // self.order.effective_batch_size)

    def __iter__(self) -> Iterator[list[list[int]]]:
        for batch in self.order.batches():
            groups = self.split(self.order.lengths[batch].tolist())
            yield [batch[group].tolist() for group in groups]


def step_sampler(order: EffectiveBatchOrder, plan: TrainPlan) -> StepSampler:
    """The steps of `order`, split into micro-batches as `plan` says."""
    if plan.memory.packing:
        return StepSampler(order, partial(pack, capacity_tokens=workload_of(plan).capacity_tokens))
    return StepSampler(
        order, partial(rows_at_a_time, micro_batch_size=plan.memory.micro_batch_size)
    )


class StepRows:
    """A data set whose item is a micro-batch: the rows of the numbers asked for."""

    def __init__(self, rows: Dataset) -> None:
        self._rows = rows.with_format("numpy")

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, numbers: Sequence[int]) -> list[dict[str, Any]]:
        columns = self._rows[list(numbers)]
        return [
            {name: values[index] for name, values in columns.items()}
            for index in range(len(numbers))
        ]


@dataclass(frozen=True)
class StepCollator:
    """Collates each micro-batch of a step by itself."""

    collate: Callable[[Sequence[Mapping[str, Any]]], MicroBatch]

    def __call__(self, micro_batches: Sequence[Sequence[Mapping[str, Any]]]) -> list[MicroBatch]:
        """One item per micro-batch, in order."""
        return [self.collate(rows) for rows in micro_batches]
