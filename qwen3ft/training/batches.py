"""Micro-batches of an optimizer step: their order, their rows, and packing them into tensors.

Real tokens appear once and in order; padding carries no loss; no token is the target of a token of
another sequence. Importing this module does not import torch, for the preflight's planning.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from qwen3ft.data.collators import IGNORED_LABEL, labels_of
from qwen3ft.planning.dealing import Split, split_for_rank, split_of
from qwen3ft.planning.packing import Lengths, epoch_order, row_tokens

if TYPE_CHECKING:
    from datasets import Dataset
    from torch.utils.data import DataLoader, Sampler

    from qwen3ft.records.plan import TrainPlan


MicroBatch = dict[str, Any]
"""Tensors by name, as a collator returns them; a packed one also has two plain numbers."""


@dataclass(frozen=True)
class PackedCollator:
    """Collator that concatenates sequences to one row, with the slots of `row_tokens`."""

    pad_token_id: int
    graphs: bool = False

    def __call__(self, rows: Sequence[Mapping[str, Any]]) -> MicroBatch:
        """Return a packed row of T slots.

        Returns:
            `input_ids`, `labels` and `position_ids`: int64, (1, T).
            `cu_seqlens`: int32, (segments + 1,): start of each segment, and T.
            `targets`: int64, (trained tokens,): the labels that are not `IGNORED_LABEL`.
            `target_positions`: int64, (trained tokens,): the slots that predict them.
            `max_length`: tokens of the longest segment.
            `real_tokens`: slots that are not padding.
        """
        import torch

        lengths = [len(row["input_ids"]) for row in rows]
        real = sum(lengths)
        slots = row_tokens(real, graphs=self.graphs)
        # Padding is a segment of its own: no sequence attends to it, and kernels for sequences of
        # varying length leave no slot undefined.
        segments = lengths + ([slots - real] if slots > real else [])
        bounds = np.concatenate(([0], np.cumsum(segments))).astype(np.int32)
        ids = np.full(slots, self.pad_token_id, dtype=np.int64)
        labels = np.full(slots, IGNORED_LABEL, dtype=np.int64)
        for row, start, length in zip(rows, bounds.tolist(), lengths, strict=False):
            ids[start : start + length] = row["input_ids"]
            labels[start : start + length] = labels_of(row)
        labels[bounds[:-1]] = IGNORED_LABEL  # the slot before belongs to another sequence
        # There is no attention mask: where positions start at 0 again, transformers' Qwen3 begins a
        # new sequence (`masking_utils.find_packed_sequence_indices`) and masks block-diagonally.
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
    """Count the tokens of a micro-batch, without padding."""
    if "real_tokens" in batch:
        return int(batch["real_tokens"])
    return int(batch["attention_mask"].sum())


def trained_tokens(batch: Mapping[str, Any]) -> int:
    """Count the targets of a micro-batch: its labels without the first of each row."""
    return int((batch["labels"][:, 1:] != IGNORED_LABEL).sum())


class EffectiveBatchOrder:
    """Row numbers of an epoch (`planning.packing.epoch_order`), independent of the capacity.

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
        """Yield the row numbers of each effective batch."""
        return epoch_order(self.lengths, self.effective_batch_size, self.seed, self.epoch)


class StepSampler:
    """Batch sampler with one item per optimizer step: the row numbers of each micro-batch.

    Args:
        order: Rows of each effective batch.
        split: From the lengths of a step's rows to positions among them, one list per micro-batch.
    """

    def __init__(self, order: EffectiveBatchOrder, split: Split) -> None:
        self.order = order
        self.split = split
        self.batch_size = order.effective_batch_size  # accelerate expects this and the next
        self.drop_last = False

    def __len__(self) -> int:
        return -(-len(self.order) // self.order.effective_batch_size)

    def __iter__(self) -> Iterator[list[list[int]]]:
        for batch in self.order.batches():
            groups = self.split(self.order.lengths[batch].tolist())
            # Numbers, not rows: accelerate skips steps here on a resume, before they are read.
            yield [batch[group].tolist() for group in groups]


def step_sampler(
    order: EffectiveBatchOrder, plan: TrainPlan, rank: int | None = None
) -> StepSampler:
    """Return the steps of `order`, split into micro-batches by `plan`: all, or those of a rank."""
    return StepSampler(order, split_of(plan) if rank is None else split_for_rank(plan, rank))


class StepRows:
    """Data set whose items are micro-batches, by their row numbers."""

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
    """Collator of a step, which collates each micro-batch separately."""

    collate: Callable[[Sequence[Mapping[str, Any]]], MicroBatch]

    def __call__(self, micro_batches: Sequence[Sequence[Mapping[str, Any]]]) -> list[MicroBatch]:
        """Return one item per micro-batch, in order."""
        return [self.collate(rows) for rows in micro_batches]


def step_loader(
    rows: Dataset,
    sampler: Sampler[Any],
    collate: Callable[[Sequence[Mapping[str, Any]]], MicroBatch],
    *,
    pin_memory: bool,
) -> DataLoader[list[MicroBatch]]:
    """Return a loader of optimizer steps, each the list of its micro-batches."""
    from torch.utils.data import DataLoader

    return DataLoader(
        StepRows(rows),  # type: ignore[arg-type]
        batch_sampler=sampler,
        collate_fn=StepCollator(collate),
        pin_memory=pin_memory,
    )
