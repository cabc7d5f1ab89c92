"""The element-wise work of a Qwen3 block as Triton kernels: the twin of `reference`.

What each function means stands there; here each is one pass over memory, since that is all it
costs. Tensors are bf16, fp16 or fp32 on the current CUDA device, of compute capability 8.0 or
above; nothing waits for the device. Tile sizes are fixed: tuning at run time would cost the first
step more than it returned. Offsets of rows are 64-bit: 131,072 rows of 19,456 numbers are above
2**31. A kernel that overwrites its input has one thread load and store each number: its tile must
be no smaller than its threads, or copies of a number would be loaded after it was overwritten.
"""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from typing import Any

import torch
import triton

from qwen3ft.training.fused import kernels_device as device
from qwen3ft.training.fused import kernels_weights as weight_device
from qwen3ft.training.fused import reference
from qwen3ft.training.fused.kernels_weights import TILE_ROWS, TILE_WORDS, WARPS
from qwen3ft.training.fused.weights import FourBitWeight


def dequantize(
    weights: Sequence[FourBitWeight],
    out: torch.Tensor,
    beside: torch.Tensor | None = None,
    below: torch.Tensor | None = None,
) -> None:
    """As `reference.dequantize`, and bit for bit as bitsandbytes does it; in one launch."""
    key = tuple(map(id, weights))
    group = _groups.get(key)
    if group is None:
        group = _groups[key] = _Group(weights)
        for weight in weights:
            weakref.finalize(weight, _groups.pop, key, None)
    if group.fits:
        group.launch(out, beside, below)
    else:
        reference.dequantize(weights, out, beside, below)


class _Group:
    """Weights whose tensors' addresses and sizes are looked up once, as each launch is short."""

    def __init__(self, weights: Sequence[FourBitWeight]) -> None:
        first = weights[0]
        self.block, self.nested_block = first.block, first.nested_block
        self.nested = first.nested_code is not None
        self.columns = first.in_features
        # Eight numbers are read as one 32-bit word; a row, and a tile, are whole blocks.
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
        self.fixed = _Fixed([tensor for weight in padded for tensor in _tensors(weight)])
        rows = [weight.out_features for weight in weights]
        self.rows = tuple([*rows, 0, 0][:3])
        self.tiles = sum(triton.cdiv(count, TILE_ROWS) for count in rows)
        self.column_tiles = triton.cdiv(self.columns // 8, TILE_WORDS)

    def launch(
        self, out: torch.Tensor, beside: torch.Tensor | None, below: torch.Tensor | None
    ) -> None:
        """Write the weights and what belongs to them into `out`."""
        below_rows = 0 if below is None else len(below)
        grid = (
            self.column_tiles + (beside is not None),
            self.tiles + triton.cdiv(below_rows, TILE_ROWS),
            1,
        )
        unit = _unit(out)
        # A contracted product and sum would round once where bitsandbytes rounds twice.
        _launch(
            weight_device.dequantize,
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


def _tensors(weight: FourBitWeight) -> tuple[torch.Tensor | None, ...]:
    nested = weight.nested_code, weight.nested_absmax, weight.nested_offset
    return weight.packed, weight.code, weight.absmax, *nested


def rms_norm(x: torch.Tensor, weight: torch.Tensor, eps: float, out: torch.Tensor) -> None:
    """As `reference.rms_norm`."""
    tokens, hidden = x.shape
    unit, tile = _unit(x, out), triton.next_power_of_2(hidden)
    _launch(
        device.rms_norm,
        (tokens, 1, 1),
        (x, weight, out),
        (x.stride(0) // unit, out.stride(0) // unit, eps),
        (hidden, unit, tile),
        num_warps=_row_warps(tile),
    )


def rms_norm_backward(
    d_out: torch.Tensor, x: torch.Tensor, weight: torch.Tensor, eps: float, d_x: torch.Tensor
) -> None:
    """As `reference.rms_norm_backward`."""
    tokens, hidden = x.shape
    unit, tile = _unit(d_out, x, d_x), triton.next_power_of_2(hidden)
    _launch(
        device.rms_norm_backward,
        (tokens, 1, 1),
        (d_out, x, weight, d_x),
        (d_out.stride(0) // unit, x.stride(0) // unit, d_x.stride(0) // unit, eps),
        (hidden, unit, tile),
        num_warps=_row_warps(tile),
    )


def norm_rotate(
    heads: torch.Tensor, weight: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, eps: float
) -> torch.Tensor:
    """As `reference.norm_rotate`; head_dim is a power of two."""
    tokens, count, head_dim = heads.shape
    out = torch.empty((tokens, count, head_dim), dtype=heads.dtype, device=heads.device)
    strides, unit = _strides(heads, cos, sin)
    tile = _head_tile(head_dim)
    _launch(
        device.norm_rotate,
        (triton.cdiv(tokens * count, tile), 1, 1),
        (heads, weight, cos, sin, out),
        (*strides, tokens * count, eps),
        (count, unit, head_dim // 2, tile),
        num_warps=4,
    )
    return out


def norm_rotate_backward(
    d_out: torch.Tensor,
    heads: torch.Tensor,
    weight: torch.Tensor,
    cos: torch.Tensor,
    sin: torch.Tensor,
    eps: float,
) -> None:
    """As `reference.norm_rotate_backward`; head_dim is a power of two."""
    tokens, count, head_dim = heads.shape
    strides, unit = _strides(d_out, heads, cos, sin)
    tile = _head_tile(head_dim)
    _launch(
        device.norm_rotate_backward,
        (triton.cdiv(tokens * count, tile), 1, 1),
        (d_out, heads, weight, cos, sin),
        (*strides, tokens * count, eps),
        (count, unit, head_dim // 2, tile),
        num_warps=4,
    )


def silu_mul(gate_up: torch.Tensor, out: torch.Tensor) -> None:
    """As `reference.silu_mul`."""
    tokens, size = out.shape
    unit, tiles = _unit(gate_up, out), triton.cdiv(size, 2048)
    _launch(
        device.silu_mul,
        (tokens * tiles, 1, 1),
        (gate_up, out),
        (gate_up.stride(0) // unit, out.stride(0) // unit),
        (size, tiles, unit, 2048),
        num_warps=4,
    )


def silu_mul_backward(d_out: torch.Tensor, gate_up: torch.Tensor) -> None:
    """As `reference.silu_mul_backward`."""
    tokens, size = d_out.shape
    unit, tiles = _unit(d_out, gate_up), triton.cdiv(size, 1024)
    _launch(
        device.silu_mul_backward,
        (tokens * tiles, 1, 1),
        (d_out, gate_up),
        (d_out.stride(0) // unit, gate_up.stride(0) // unit),
        (size, tiles, unit, 1024),
        num_warps=4,
    )


def cross_entropy(logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """As `reference.cross_entropy`; a softmax in two passes (Milakov, Gimelshein 2018).

    Of arXiv:1805.02867: maximum and sum come of the first pass together.
    """
    rows, vocabulary = logits.shape
    losses = torch.empty(rows, dtype=torch.float32, device=logits.device)
    unit = _unit(logits)
    _launch(
        device.cross_entropy,
        (rows, 1, 1),
        (logits, targets, losses),
        (logits.stride(0) // unit,),
        (vocabulary, unit, triton.cdiv(vocabulary, 16384), 2048),
        num_warps=16,
    )
    return losses


class _Fixed:
    """Tensors that are the same at each launch, with what a launch needs to know of them."""

    def __init__(self, tensors: Sequence[torch.Tensor | None]) -> None:
        self.tensors = tuple(tensors)
        self.addresses = tuple(None if one is None else one.data_ptr() for one in tensors)
        self.kinds = tuple(_kind(tensor) for tensor in tensors)


_groups: dict[tuple[int, ...], _Group] = {}
"""By the identities of their weights, as long as these live."""
_compiled: dict[tuple[Any, ...], Any] = {}
_nothing = _Fixed(())


def _launch(
    kernel: Any,
    grid: tuple[int, int, int],
    tensors: tuple[torch.Tensor | None, ...],
    numbers: tuple[float, ...],
    constants: tuple[Any, ...],
    fixed: _Fixed = _nothing,
    **options: Any,
) -> None:
    """Run `kernel`, whose arguments come in the order of these.

    Triton finds out at each launch which compiled kernel fits, which takes longer than to start it.
    Here that is the kernel's own, its constants (which imply its options), and of each tensor the
    type and whether it begins at a multiple of 16 bytes; numbers must be named in the kernel's
    `do_not_specialize`.
    """
    assert tensors[0] is not None
    key = (kernel, constants, fixed.kinds, tensors[0].get_device(), *map(_kind, tensors))
    compiled = _compiled.get(key)
    if compiled is not None:
        compiled[grid](*fixed.addresses, *tensors, *numbers, *constants)
        return
    compiled = kernel[grid](*fixed.tensors, *tensors, *numbers, *constants, **options)
    if compiled is not None:  # as in Triton's interpreter
        _compiled[key] = compiled


def _kind(tensor: torch.Tensor | None) -> Any:
    return None if tensor is None else (tensor.dtype, tensor.data_ptr() % 16 == 0)


def _strides(*tensors: torch.Tensor) -> tuple[list[int], int]:
    """All but the last of each, in units, and the unit (see `_unit`)."""
    strides = [stride for tensor in tensors for stride in tensor.stride()[:-1]]
    unit = 1 if any(stride % 8 for stride in strides) else 8
    return [stride // unit for stride in strides], unit


def _row_warps(tile: int) -> int:
    """Warps for a program that holds a row of `tile` numbers: at most 16 numbers a thread."""
    return min(16, max(4, tile // 512))


def _head_tile(head_dim: int) -> int:
    """Heads of a program: 2,048 numbers in all."""
    return max(1, 2048 // head_dim)


def _unit(*tensors: torch.Tensor) -> int:
    """What their row strides are counted in, so that the compiler knows how rows are aligned."""
    return 8 if all(tensor.stride(0) % 8 == 0 for tensor in tensors) else 1
