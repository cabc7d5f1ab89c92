"""Attention of one new token in each slot over the answer so far, in plain torch.

The Triton kernels in `qwen3ft.decoding.kernels` do the same on a GPU. Each slot is computed on its
own, so its numbers do not depend on the others.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from qwen3ft.planning.decoder_sizes import PAGE_TOKENS
from qwen3ft.training.fused.ops import ElementWise


@dataclass(frozen=True)
class Slots:
    """Where each slot is; all on the device.

    Attributes:
        positions: int32, (slots,): number of tokens before the new one; 0 for idle slots.
        pages: int32, (slots, most pages of an answer): its pages; 0 for idle slots and beyond.
        cos: fp32, (slots, head_dim / 2): rotation at the position.
        sin: fp32, (slots, head_dim / 2).
    """

    positions: Tensor
    pages: Tensor
    cos: Tensor
    sin: Tensor


@dataclass(frozen=True)
class HeadNorms:
    """Norms of queries and keys of a block, (head_dim,) each, with one epsilon."""

    query: Tensor
    key: Tensor
    eps: float

    @classmethod
    def of(cls, attention: Any) -> HeadNorms:
        """Return those of a `Qwen3Attention`."""
        query, key = attention.q_norm, attention.k_norm
        return cls(query.weight, key.weight, query.variance_epsilon)


class SlotAttention(Protocol):
    """The two functions of a decoding step that know pages."""

    def enter(
        self, qkv: Tensor, norms: HeadNorms, slots: Slots, keys: Tensor, values: Tensor
    ) -> Tensor:
        """Norm and rotate queries and keys; write keys and values into the cache.

        Args:
            qkv: (slots, all heads x head_dim).
            norms: Norms of the block.
            slots: Where each token belongs.
            keys: The block's part of the cache, (places, key-value heads, head_dim).
            values: As `keys`.

        Returns:
            The queries, (slots, query heads, head_dim).
        """

    def attend(self, q: Tensor, slots: Slots, keys: Tensor, values: Tensor, out: Tensor) -> None:
        """Write softmax(q k / sqrt(head_dim)) v over all tokens up to the new one into `out`.

        Args:
            q: As `enter` returned it.
            slots: As for `enter`.
            keys: As for `enter`.
            values: As for `enter`.
            out: (slots, query heads x head_dim), perhaps a view with wider rows.
        """


class PlainAttention:
    """`SlotAttention` in plain torch."""

    def __init__(self, ops: ElementWise) -> None:
        self.ops = ops

    def enter(
        self, qkv: Tensor, norms: HeadNorms, slots: Slots, keys: Tensor, values: Tensor
    ) -> Tensor:
        """Norm, rotate and write."""
        _, count, head_dim = keys.shape
        heads = qkv.view(len(qkv), -1, head_dim)
        queries = heads.shape[1] - 2 * count
        q, k, v = heads[:, :queries], heads[:, queries:-count], heads[:, -count:]
        k = self.ops.norm_rotate(k, norms.key, slots.cos, slots.sin, norms.eps)
        page = slots.pages.gather(1, (slots.positions // PAGE_TOKENS).long()[:, None])[:, 0].long()
        place = page * PAGE_TOKENS + slots.positions % PAGE_TOKENS
        keys.index_copy_(0, place, k)
        values.index_copy_(0, place, v)
        return self.ops.norm_rotate(q, norms.query, slots.cos, slots.sin, norms.eps)

    def attend(self, q: Tensor, slots: Slots, keys: Tensor, values: Tensor, out: Tensor) -> None:
        """Compute slot by slot in fp32; idle slots are skipped."""
        group = q.shape[1] // keys.shape[1]
        offsets = torch.arange(PAGE_TOKENS, device=q.device)
        first_pages = slots.pages[:, 0].tolist()
        for slot, position in enumerate(slots.positions.tolist()):
            if first_pages[slot] == 0:
                out[slot] = 0
                continue
            used = slots.pages[slot, : position // PAGE_TOKENS + 1].long()
            places = (used[:, None] * PAGE_TOKENS + offsets).flatten()[: position + 1]
            k, v = (
                part[places].float().repeat_interleave(group, dim=1).transpose(0, 1)
                for part in (keys, values)
            )
            scores = q[slot].float()[:, None] @ k.transpose(1, 2) / math.sqrt(q.shape[-1])
            out[slot] = (scores.softmax(-1) @ v).flatten()
