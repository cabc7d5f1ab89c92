"""The element-wise work of a Qwen3 block as Triton kernels: the twin of `qwen3ft.fused.reference`.

What each function means stands there; here each is one pass over memory, since that is all it
costs. Tensors are bf16, fp16 or fp32 on the current CUDA device, of compute capability 8.0 or
above; nothing waits for the device. Tile sizes are fixed: tuning at run time would cost the first
step more than it returned. Offsets of rows are 64-bit: 131,072 rows of 19,456 numbers are above
2**31. A kernel that overwrites its input has one thread load and store each number: its tile must
be no smaller than its threads, or copies of a number would be loaded after it was overwritten.
"""

from __future__ import annotations

import torch
import triton

from qwen3ft.fused import kernels_device as device
from qwen3ft.fused import reference
from qwen3ft.fused.weights import FourBitWeight


def dequantize(weight: FourBitWeight, out: torch.Tensor) -> None:
    """As `reference.dequantize`, and bit for bit as bitsandbytes does it."""
    rows, columns = weight.out_features, weight.in_features
    # Eight numbers are read as one 32-bit word, so no row and no block may begin inside a word.
    if columns % 8 or weight.block % 8 or weight.packed.data_ptr() % 4:
        reference.dequantize(weight, out)
        return
    words = columns // 8
    unit = _unit(out)
    nested = weight.nested_code is not None
    # A contracted product and sum would round once where bitsandbytes rounds twice.
    device.dequantize[(triton.cdiv(words, 64), triton.cdiv(rows, 16))](
        weight.packed,
        weight.code,
        weight.absmax,
        weight.nested_code,
        weight.nested_absmax,
        weight.nested_offset,
        out,
        rows,
        words,
        out.stride(0) // unit,
        unit=unit,
        nested=nested,
        block_words=weight.block // 8,
        nested_block=weight.nested_block,
        tile_rows=16,
        tile_words=64,
        num_warps=8,
        enable_fp_fusion=False,
    )


def rms_norm(x: torch.Tensor, weight: torch.Tensor, eps: float, out: torch.Tensor) -> None:
    """As `reference.rms_norm`."""
    tokens, hidden = x.shape
    unit, tile = _unit(x, out), triton.next_power_of_2(hidden)
    device.rms_norm[(tokens,)](
        x,
        weight,
        out,
        x.stride(0) // unit,
        out.stride(0) // unit,
        hidden,
        eps,
        unit=unit,
        tile=tile,
        num_warps=_row_warps(tile),
    )


def rms_norm_backward(
    d_out: torch.Tensor, x: torch.Tensor, weight: torch.Tensor, eps: float, d_x: torch.Tensor
) -> None:
    """As `reference.rms_norm_backward`."""
    tokens, hidden = x.shape
    unit, tile = _unit(d_out, x, d_x), triton.next_power_of_2(hidden)
    device.rms_norm_backward[(tokens,)](
        d_out,
        x,
        weight,
        d_x,
        d_out.stride(0) // unit,
        x.stride(0) // unit,
        d_x.stride(0) // unit,
        hidden,
        eps,
        unit=unit,
        tile=tile,
        num_warps=_row_warps(tile),
    )


def norm_rotate(
    heads: torch.Tensor, weight: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, eps: float
) -> torch.Tensor:
    """As `reference.norm_rotate`; head_dim is a power of two."""
    tokens, count, head_dim = heads.shape
    out = torch.empty((tokens, count, head_dim), dtype=heads.dtype, device=heads.device)
    unit, tile = _unit(heads), _head_tile(head_dim)
    device.norm_rotate[(triton.cdiv(tokens * count, tile),)](
        heads,
        weight,
        cos,
        sin,
        out,
        heads.stride(0) // unit,
        heads.stride(1),
        cos.stride(0),
        sin.stride(0),
        tokens * count,
        count,
        eps,
        unit=unit,
        half=head_dim // 2,
        tile=tile,
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
    unit, tile = _unit(d_out, heads), _head_tile(head_dim)
    device.norm_rotate_backward[(triton.cdiv(tokens * count, tile),)](
        d_out,
        heads,
        weight,
        cos,
        sin,
        d_out.stride(0) // unit,
        d_out.stride(1),
        heads.stride(0) // unit,
        heads.stride(1),
        cos.stride(0),
        sin.stride(0),
        tokens * count,
        count,
        eps,
        unit=unit,
        half=head_dim // 2,
        tile=tile,
        num_warps=4,
    )


def silu_mul(gate_up: torch.Tensor, out: torch.Tensor) -> None:
    """As `reference.silu_mul`."""
    tokens, size = out.shape
    unit, tiles = _unit(gate_up, out), triton.cdiv(size, 2048)
    device.silu_mul[(tokens * tiles,)](
        gate_up,
        out,
        gate_up.stride(0) // unit,
        out.stride(0) // unit,
        size,
        tiles,
        unit=unit,
        tile=2048,
        num_warps=4,
    )


def silu_mul_backward(d_out: torch.Tensor, gate_up: torch.Tensor) -> None:
    """As `reference.silu_mul_backward`."""
    tokens, size = d_out.shape
    unit, tiles = _unit(d_out, gate_up), triton.cdiv(size, 1024)
    device.silu_mul_backward[(tokens * tiles,)](
        d_out,
        gate_up,
        d_out.stride(0) // unit,
        gate_up.stride(0) // unit,
        size,
        tiles,
        unit=unit,
        tile=1024,
        num_warps=4,
    )


def cross_entropy(logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """As `reference.cross_entropy`; a softmax in two passes (Milakov, Gimelshein 2018).

    Of arXiv:1805.02867: maximum and sum come of the first pass together.
    """
    rows, vocabulary = logits.shape
    losses = torch.empty(rows, dtype=torch.float32, device=logits.device)
    device.cross_entropy[(rows,)](
        logits,
        targets,
        losses,
        logits.stride(0),
        vocabulary,
        steps=triton.cdiv(vocabulary, 16384),
        tile=2048,
        num_warps=16,
    )
    return losses


def _row_warps(tile: int) -> int:
    """Warps for a program that holds a row of `tile` numbers: at most 16 numbers a thread."""
    return min(16, max(4, tile // 512))


def _head_tile(head_dim: int) -> int:
    """Heads of a program: 2,048 numbers in all."""
    return max(1, 2048 // head_dim)


def _unit(*tensors: torch.Tensor) -> int:
    """What their row strides are counted in, so that the compiler knows how rows are aligned."""
    return 8 if all(tensor.stride(0) % 8 == 0 for tensor in tensors) else 1
