"""Packed texts as tensors of fixed sizes, which a captured pass over them reads."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

import torch
from torch import Tensor

READ_TEXTS = 64
"""Most texts that are read together; the padding is one more."""


@dataclass(frozen=True)
class PackedReading:
    """Texts of T tokens in all, padding included.

    Attributes:
        ids: int64, (T,).
        positions: int64, (T,): place of each token in its text.
        models: int64, (T,): number of its adapter.
        places: int64, (T,): where the cache keeps it; 0 to keep nothing.
        bounds: int32, (READ_TEXTS + 2,): start of each text, then the end.
        host_bounds: Those of `bounds` that differ.
    """

    ids: Tensor
    positions: Tensor
    models: Tensor
    places: Tensor
    bounds: Tensor
    host_bounds: tuple[int, ...]

    @classmethod
    def of(
        cls,
        texts: Sequence[Sequence[int]],
        models: Sequence[int],
        places: Sequence[Tensor] | None,
        chunk_tokens: int,
    ) -> PackedReading:
        """Pack `texts` and pad them to whole chunks; see `qwen3ft.decoding.decoder`."""
        lengths = [len(text) for text in texts]
        padding = -sum(lengths) % chunk_tokens
        texts, models = [*texts, [0] * padding], [*models, models[0]]
        lengths.append(padding)
        counts = torch.tensor(lengths)
        bounds = [0, *counts.cumsum(0).tolist()]
        kept = torch.zeros(bounds[-1], dtype=torch.int64)
        if places is not None:
            kept[: bounds[-2]] = torch.cat(list(places))
        return cls(
            ids=torch.tensor([token for text in texts for token in text]),
            positions=torch.cat([torch.arange(length) for length in lengths]),
            models=torch.tensor(models).repeat_interleave(counts),
            places=kept,
            bounds=torch.tensor(
                bounds + [bounds[-1]] * (READ_TEXTS + 2 - len(bounds)), dtype=torch.int32
            ),
            host_bounds=tuple(dict.fromkeys(bounds)),
        )

    def to(self, device: torch.device) -> PackedReading:
        """Return a copy on `device`."""
        moved: dict[str, Any] = {name: tensor.to(device) for name, tensor in self._tensors()}
        return replace(self, **moved)

    def copy_(self, other: PackedReading) -> None:
        """Overwrite the tensors with those of `other`, which has as many tokens."""
        source = dict(other._tensors())
        for name, tensor in self._tensors():
            tensor.copy_(source[name])

    def _tensors(self) -> list[tuple[str, Tensor]]:
        named = [(field.name, getattr(self, field.name)) for field in fields(self)]
        return [(name, value) for name, value in named if isinstance(value, Tensor)]
