"""Shared inputs of the tests of the fused step's element-wise functions."""

from __future__ import annotations

import os
from typing import Any, NamedTuple

import pytest
import torch

from qwen3ft.training.fused.weights import FourBitWeight

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
# The interpreter cuts bits off where a GPU rounds, so there bits are compared in fp32.
QUANTISED_TYPE = torch.float32 if INTERPRETED else torch.bfloat16
QUANTISED = pytest.mark.parametrize("form", [("nf4", True), ("nf4", False), ("fp4", True)])
EPS = 1e-6
# (columns beside, rows below, columns behind): also such that no row begins at 16 bytes.
ADAPTERS = pytest.mark.parametrize(
    "adapter",
    [(0, 0, 0), (0, 0, 5), (24, 0, 0), (72, 0, 8), (0, 40, 0), (8, 16, 3), (3, 5, 0)],
)


def quantised(shape: tuple[int, int], kind: str, double: bool, device: str) -> Any:
    """Return a weight of bitsandbytes."""
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
    """Return bitsandbytes' dequantised weight."""
    import bitsandbytes.functional as bnb

    return bnb.dequantize_4bit(weight.data, weight.quant_state).reshape(weight.quant_state.shape)


class Group(NamedTuple):
    """Arguments of `dequantize`, and `out` afterwards, with 7 where nothing is written."""

    weights: list[FourBitWeight]
    out: torch.Tensor
    beside: torch.Tensor | None
    below: torch.Tensor | None
    truth: torch.Tensor


def grouped(
    rows: tuple[int, ...],
    columns: int,
    form: tuple[str, bool],
    device: str,
    adapter: tuple[int, int, int] = (0, 0, 0),
) -> Group:
    """Return weights below each other, with adapters of that size, and room behind."""
    dtype, (beside, below, behind) = QUANTISED_TYPE, adapter
    made = [quantised((count, columns), *form, device) for count in rows]
    height = sum(rows)
    truth = torch.full(
        (height + below + 2, columns + beside + behind), 7.0, dtype=dtype, device=device
    )
    out = truth.clone()
    truth[:height, :columns] = torch.cat([dequantised(weight) for weight in made])
    right = torch.randn(height, beside, device=device).to(dtype)
    under = torch.randn(below, columns, device=device).to(dtype)
    truth[:height, columns : columns + beside] = right
    truth[height : height + below, :columns] = under
    return Group(
        [FourBitWeight.of(weight) for weight in made],
        out,
        right if beside else None,
        under if below else None,
        truth,
    )


def wide(*shape: int, dtype: torch.dtype, device: str, behind: int = 24) -> torch.Tensor:
    """Return a random matrix that is the front of a wider one, whose other columns hold 7."""
    *rows, columns = shape
    full = torch.full((*rows, columns + behind), 7.0, dtype=dtype, device=device)
    full[..., :columns] = torch.randn(shape, device=device)
    return full[..., :columns]


def neighbours(view: torch.Tensor) -> torch.Tensor:
    """Return the columns behind a matrix of `wide`; all 7 if nothing touched them."""
    columns = view.shape[-1]
    full = view.as_strided((*view.shape[:-1], view.stride(0)), view.stride())
    return full[..., columns:]


def rotation(tokens: int, head_dim: int, device: str = "cpu") -> tuple[torch.Tensor, torch.Tensor]:
    """Return cosines and sines of random angles, (tokens, head_dim / 2)."""
    angles = torch.rand(tokens, head_dim // 2, device=device) * 6.3
    return angles.cos(), angles.sin()
