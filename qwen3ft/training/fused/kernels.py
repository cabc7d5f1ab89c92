"""`qwen3ft.training.fused.ops` as Triton kernels: one pass over memory for each function.

Tensors are bf16, fp16 or fp32 on the current CUDA device, of compute capability 8.0 or above.
Nothing waits for the device.
"""

# Tile sizes are fixed: tuning at run time would cost the first step more than it could win back.
# Row offsets are 64-bit: 131,072 rows of 19,456 numbers exceed 2**31. A kernel that overwrites its
# input must load and store each number in one thread: a tile must not be smaller than its threads,
# or copies of a number would be loaded after it was overwritten.

from __future__ import annotations

import weakref
from collections.abc import Sequence

import torch
import triton
from torch import Tensor

from qwen3ft.training.fused import kernels_device as device
from qwen3ft.training.fused import kernels_weights as weight_device
from qwen3ft.training.fused.kernels_weights import TILE_ROWS, TILE_WORDS, WARPS
from qwen3ft.training.fused.launch import Fixed, launch
from qwen3ft.training.fused.reference import ReferenceOps
from qwen3ft.training.fused.weights import FourBitWeight


class TritonOps:
    """`ElementWise` as Triton kernels."""

    @staticmethod
    def dequantize(
        weights: Sequence[FourBitWeight],
        out: Tensor,
        beside: Tensor | None = None,
        below: Tensor | None = None,
    ) -> None:
        """Write the weights in one launch, bit for bit as bitsandbytes does."""
        key = tuple(map(id, weights))
        group = _groups.get(key)
        if group is None:
            group = _groups[key] = _Group(weights)
            for weight in weights:
                # CPython gives the ids of what is gone to new objects.
                weakref.finalize(weight, _groups.pop, key, None)
        if group.fits:
            group.write(out, beside, below)
        else:
            ReferenceOps.dequantize(weights, out, beside, below)

    @staticmethod
    def rms_norm(x: Tensor, weight: Tensor, eps: float, out: Tensor) -> None:
        """Store weight x / rms(x), a program a row."""
        tokens, hidden = x.shape
        unit, tile = _unit(x, out), triton.next_power_of_2(hidden)
        launch(
            device.rms_norm_kernel,
            (tokens, 1, 1),
            (x, weight, out),
            (x.stride(0) // unit, out.stride(0) // unit, eps),
            (hidden, unit, tile),
            num_warps=_row_warps(tile),
        )

    @staticmethod
    def rms_norm_backward(
        d_out: Tensor, x: Tensor, weight: Tensor, eps: float, d_x: Tensor
    ) -> None:
        """Add the gradient with respect to x to `d_x`, a program a row."""
        tokens, hidden = x.shape
        unit, tile = _unit(d_out, x, d_x), triton.next_power_of_2(hidden)
        launch(
            device.rms_norm_backward_kernel,
            (tokens, 1, 1),
            (d_out, x, weight, d_x),
            (d_out.stride(0) // unit, x.stride(0) // unit, d_x.stride(0) // unit, eps),
            (hidden, unit, tile),
            num_warps=_row_warps(tile),
        )

    @staticmethod
    def norm_rotate(heads: Tensor, weight: Tensor, cos: Tensor, sin: Tensor, eps: float) -> Tensor:
        """Return normed and rotated heads; head_dim must be a power of two."""
        tokens, count, head_dim = heads.shape
        out = torch.empty((tokens, count, head_dim), dtype=heads.dtype, device=heads.device)
        strides, unit = _strides(heads, cos, sin)
        tile = _head_tile(head_dim)
        launch(
            device.norm_rotate_kernel,
            (triton.cdiv(tokens * count, tile), 1, 1),
            (heads, weight, cos, sin, out),
            (*strides, tokens * count, eps),
            (count, unit, head_dim // 2, tile),
            num_warps=4,
        )
        return out

    @staticmethod
    def norm_rotate_backward(
        d_out: Tensor, heads: Tensor, weight: Tensor, cos: Tensor, sin: Tensor, eps: float
    ) -> None:
        """Overwrite `heads` with its gradient; head_dim must be a power of two."""
        tokens, count, head_dim = heads.shape
        strides, unit = _strides(d_out, heads, cos, sin)
        tile = _head_tile(head_dim)
        launch(
            device.norm_rotate_backward_kernel,
            (triton.cdiv(tokens * count, tile), 1, 1),
            (d_out, heads, weight, cos, sin),
            (*strides, tokens * count, eps),
            (count, unit, head_dim // 2, tile),
            num_warps=4,
        )

    @staticmethod
    def silu_mul(gate_up: Tensor, out: Tensor) -> None:
        """Store silu(gate) x up."""
        tokens, size = out.shape
        unit, tiles = _unit(gate_up, out), triton.cdiv(size, 2048)
        launch(
            device.silu_mul_kernel,
            (tokens * tiles, 1, 1),
            (gate_up, out),
            (gate_up.stride(0) // unit, out.stride(0) // unit),
            (size, tiles, unit, 2048),
            num_warps=4,
        )

    @staticmethod
    def silu_mul_backward(d_out: Tensor, gate_up: Tensor) -> None:
        """Overwrite `gate_up` with its gradient, and `d_out` with the output."""
        tokens, size = d_out.shape
        unit, tiles = _unit(d_out, gate_up), triton.cdiv(size, 1024)
        launch(
            device.silu_mul_backward_kernel,
            (tokens * tiles, 1, 1),
            (d_out, gate_up),
            (d_out.stride(0) // unit, gate_up.stride(0) // unit),
            (size, tiles, unit, 1024),
            num_warps=4,
        )

    @staticmethod
    def cross_entropy(logits: Tensor, targets: Tensor) -> Tensor:
        """Return losses, and overwrite `logits` with its gradient.

        The softmax takes two passes: the first finds maximum and sum together (Milakov and
        Gimelshein 2018, arXiv:1805.02867).
        """
        rows, vocabulary = logits.shape
        losses = torch.empty(rows, dtype=torch.float32, device=logits.device)
        unit = _unit(logits)
        launch(
            device.cross_entropy_kernel,
            (rows, 1, 1),
            (logits, targets, losses),
            (logits.stride(0) // unit,),
            (vocabulary, unit, triton.cdiv(vocabulary, 16384), 2048),
            num_warps=16,
        )
        return losses


class _Group:
    """A group of weights, whose addresses and sizes are looked up once: launches are short."""

    def __init__(self, weights: Sequence[FourBitWeight]) -> None:
        first = weights[0]
        self.block, self.nested_block = first.block, first.nested_block
        self.nested = first.nested_code is not None
        self.columns = first.in_features
        # Eight numbers are read as one 32-bit word; rows and tiles consist of whole blocks.
        self.fits = (
            len(weights) <= 3
            and self.block in (8, 16, 32, 64, 128, 256, 512)
            and all(
                weight.in_features == self.columns
                and weight.in_features % self.block == 0
                and weight.packed.data_ptr() % 4 == 0
                and (weight.block, weight.nested_block) == (self.block, self.nested_block)
                and (weight.nested_code is not None) == self.nested
                for weight in weights
            )
        )
        if not self.fits:
            return
        padded = [*weights, first, first][:3]
        self.fixed = Fixed([tensor for weight in padded for tensor in _tensors(weight)])
        rows = [weight.out_features for weight in weights]
        self.rows = tuple([*rows, 0, 0][:3])
        self.tiles = sum(triton.cdiv(count, TILE_ROWS) for count in rows)
        self.column_tiles = triton.cdiv(self.columns // 8, TILE_WORDS)

    def write(self, out: Tensor, beside: Tensor | None, below: Tensor | None) -> None:
        """Write the weights, and the two matrices beside and below, into `out`."""
        below_rows = 0 if below is None else len(below)
        grid = (
            self.column_tiles + (beside is not None),
            self.tiles + triton.cdiv(below_rows, TILE_ROWS),
            1,
        )
        unit = _unit(out)
        # A contracted product and sum would round once where bitsandbytes rounds twice.
        launch(
            weight_device.dequantize_kernel,
            grid,
            (out, beside, below),
            (*self.rows, below_rows, out.stride(0) // unit),
            (
                unit,
                self.columns // 8,
                0 if beside is None else beside.shape[1],
                self.nested,
                self.block // 8,
                self.nested_block,
                TILE_ROWS,
                TILE_WORDS,
            ),
            self.fixed,
            num_warps=WARPS,
            enable_fp_fusion=False,
        )


def _tensors(weight: FourBitWeight) -> tuple[Tensor | None, ...]:
    nested = weight.nested_code, weight.nested_absmax, weight.nested_offset
    return weight.packed, weight.code, weight.absmax, *nested


_groups: dict[tuple[int, ...], _Group] = {}
"""Groups by the ids of their weights, while these are alive."""


def _strides(*tensors: Tensor) -> tuple[list[int], int]:
    """Return all strides but the last of each tensor, in units, and the unit (see `_unit`)."""
    strides = [stride for tensor in tensors for stride in tensor.stride()[:-1]]
    unit = 1 if any(stride % 8 for stride in strides) else 8
    return [stride // unit for stride in strides], unit


def _row_warps(tile: int) -> int:
    """Return the warps for a program with a row of `tile` numbers: at most 16 numbers a thread."""
    return min(16, max(4, tile // 512))


def _head_tile(head_dim: int) -> int:
    """Return the heads of a program: 2,048 numbers in all."""
    return max(1, 2048 // head_dim)


def _unit(*tensors: Tensor) -> int:
    """Return the unit of row strides, which tells the compiler how rows are aligned."""
    return 8 if all(tensor.stride(0) % 8 == 0 for tensor in tensors) else 1
