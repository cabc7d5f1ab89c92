"""A frozen 4-bit weight as plain tensors, in bitsandbytes' layout.

Blocks of 64 weights share a constant, the largest magnitude. With double quantisation these
constants are 8-bit codes, 256 of which share a second constant (QLoRA, Dettmers et al. 2023,
arXiv:2305.14314, section 3).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True)
class FourBitWeight:
    """A weight of shape (out_features, in_features), row by row, two numbers a byte."""

    packed: Tensor
    """uint8, (out_features x in_features / 2,); the high nibble is the even number."""
    code: Tensor
    """fp32, (16,): value of each nibble, in [-1, 1]."""
    absmax: Tensor
    """Constant of each block; fp32, or uint8 with double quantisation."""
    out_features: int
    in_features: int
    block: int
    """Weights that share a constant; a power of two."""
    nested_code: Tensor | None = None
    """fp32, (256,): value of each 8-bit constant; None without double quantisation."""
    nested_absmax: Tensor | None = None
    """fp32: second constant of each `nested_block` constants, or None."""
    nested_offset: Tensor | None = None
    """fp32 scalar tensor added to every constant, or None."""
    nested_block: int = 256

    @classmethod
    def of(cls, weight: Any) -> FourBitWeight:
        """Return the tensors of `weight`, a bitsandbytes `Params4bit`, without copying them.

        Raises:
            ValueError: it is not quantised yet.
        """
        state = weight.quant_state
        if state is None:
            raise ValueError("The weight is not quantised: its quant_state is None.")
        rows, columns = state.shape
        nested = state.state2 if state.nested else None
        return cls(
            packed=weight.data.view(torch.uint8).reshape(-1),  # stored as any type (quant_storage)
            code=state.code,
            absmax=state.absmax,
            out_features=rows,
            in_features=columns,
            block=state.blocksize,
            nested_code=nested.code if nested else None,
            nested_absmax=nested.absmax if nested else None,
            nested_offset=state.offset if nested else None,
            nested_block=nested.blocksize if nested else 256,
        )
