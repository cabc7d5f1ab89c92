"""Inputs that the tests of `qwen3ft.fused`'s element-wise functions share."""

from __future__ import annotations

import os
from typing import Any

import pytest
import torch

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
# The interpreter cuts bits off where a GPU rounds, so there bits are compared in fp32.
QUANTISED_TYPE = torch.float32 if INTERPRETED else torch.bfloat16
QUANTISED = pytest.mark.parametrize(("kind", "double"), [("nf4", True), ("nf4", False), ("fp4", 1)])
EPS = 1e-6


def quantised(shape: tuple[int, int], kind: str, double: bool, device: str) -> Any:
    """A weight of bitsandbytes, with blocks of different sizes."""
    import bitsandbytes

    plain = torch.randn(shape) * torch.rand(shape[0], 1)
    weight = bitsandbytes.nn.Params4bit(
        plain.to(QUANTISED_TYPE),
        requires_grad=False,
        quant_type=kind,
        compress_statistics=bool(double),
    )
    return weight.to(device)


def dequantised(weight: Any) -> torch.Tensor:
    """What bitsandbytes makes of it."""
    import bitsandbytes.functional as bnb

    return bnb.dequantize_4bit(weight.data, weight.quant_state).reshape(weight.quant_state.shape)


def wide(*shape: int, dtype: torch.dtype, device: str, behind: int = 24) -> torch.Tensor:
    """A random matrix that is the front of a wider one, whose other columns hold 7."""
    *rows, columns = shape
    full = torch.full((*rows, columns + behind), 7.0, dtype=dtype, device=device)
    full[..., :columns] = torch.randn(shape, device=device)
    return full[..., :columns]


def neighbours(view: torch.Tensor) -> torch.Tensor:
    """The columns behind a matrix made by `wide`; all 7 if nothing touched them."""
    columns = view.shape[-1]
    full = view.as_strided((*view.shape[:-1], view.stride(0)), view.stride())
    return full[..., columns:]


def rotation(tokens: int, head_dim: int, device: str = "cpu") -> tuple[torch.Tensor, torch.Tensor]:
    """Cosines and sines of random angles, (tokens, head_dim / 2)."""
    angles = torch.rand(tokens, head_dim // 2, device=device) * 6.3
    return angles.cos(), angles.sin()
