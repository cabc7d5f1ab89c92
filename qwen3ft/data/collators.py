"""Padded batches, and the labels of a row."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    import torch


IGNORED_LABEL = -100
"""Label of a token without loss, which cross-entropy in torch and transformers ignores."""


def labels_of(row: Mapping[str, Any]) -> NDArray[np.int64]:
    """Return the labels of a row, (tokens,) int64: its token where trained, else `IGNORED_LABEL`.

    Args:
        row: `input_ids`, and either `trained` (start and end of each trained stretch, end
            exclusive) or `labels`.
    """
    if row.get("trained") is None:
        return np.asarray(row["labels"], dtype=np.int64)
    ids = np.asarray(row["input_ids"], dtype=np.int64)
    labels = np.full(len(ids), IGNORED_LABEL, dtype=np.int64)
    for start, end in np.asarray(row["trained"], dtype=np.int64).reshape(-1, 2):
        labels[start:end] = ids[start:end]
    return labels


@dataclass(frozen=True)
class PaddingCollator:
    """Pads rows on the right to a batch."""

    pad_token_id: int

    def __call__(self, rows: Sequence[Mapping[str, Any]]) -> dict[str, torch.Tensor]:
        """Return `input_ids`, `attention_mask` and `labels`, int64 (rows, longest row)."""
        import torch

        shape = (len(rows), max(len(row["input_ids"]) for row in rows))
        # On the right: transformers counts positions from the first slot, padding or not.
        ids = np.full(shape, self.pad_token_id, dtype=np.int64)
        labels = np.full(shape, IGNORED_LABEL, dtype=np.int64)
        mask = np.zeros(shape, dtype=np.int64)
        for index, row in enumerate(rows):
            length = len(row["input_ids"])
            ids[index, :length] = row["input_ids"]
            labels[index, :length] = labels_of(row)
            mask[index, :length] = 1
        arrays = {"input_ids": ids, "attention_mask": mask, "labels": labels}
        return {name: torch.from_numpy(array) for name, array in arrays.items()}
