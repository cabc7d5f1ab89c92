"""Element-wise Triton kernels, launched by `qwen3ft.training.fused.kernels`.

A program computes one tile of the grid. Sizes count numbers, not bytes; strides count units of
`unit` numbers.
"""

# mypy: disable-error-code="untyped-decorator"
from __future__ import annotations

import triton
import triton.language as tl

# `tl.constexpr` arguments are those that stay the same during a training. Nothing else is
# specialised, or each new row length would compile again. Only the alignment of rows must be known,
# for loads of 16 bytes at a time: hence `unit`.


@triton.jit(do_not_specialize=["x_stride", "out_stride"])
def rms_norm_kernel(
    x: tl.tensor,
    weight: tl.tensor,
    out: tl.tensor,
    x_stride: tl.tensor,
    out_stride: tl.tensor,
    eps: tl.tensor,
    hidden: tl.constexpr,
    unit: tl.constexpr,
    tile: tl.constexpr,
) -> None:
    """Compute one row."""
    row = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, tile)
    inside = column < hidden
    wide = tl.load(x + row * (x_stride * unit) + column, mask=inside, other=0).to(tl.float32)
    scale = tl.load(weight + column, mask=inside, other=0).to(tl.float32)
    inverse = tl.rsqrt(tl.sum(wide * wide, axis=0) / hidden + eps)
    normed = wide * inverse * scale
    tl.store(out + row * (out_stride * unit) + column, normed.to(out.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=["d_out_stride", "x_stride", "d_x_stride"])
def rms_norm_backward_kernel(
    d_out: tl.tensor,
    x: tl.tensor,
    weight: tl.tensor,
    d_x: tl.tensor,
    d_out_stride: tl.tensor,
    x_stride: tl.tensor,
    d_x_stride: tl.tensor,
    eps: tl.tensor,
    hidden: tl.constexpr,
    unit: tl.constexpr,
    tile: tl.constexpr,
) -> None:
    """Compute one row."""
    row = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, tile)
    inside = column < hidden
    wide = tl.load(x + row * (x_stride * unit) + column, mask=inside, other=0).to(tl.float32)
    source = d_out + row * (d_out_stride * unit) + column
    gradient = tl.load(source, mask=inside, other=0).to(tl.float32)
    scale = tl.load(weight + column, mask=inside, other=0).to(tl.float32)
    sums = d_x + row * (d_x_stride * unit) + column
    before = tl.load(sums, mask=inside, other=0).to(tl.float32)

    inverse = tl.rsqrt(tl.sum(wide * wide, axis=0) / hidden + eps)
    normed, scaled = wide * inverse, scale * gradient
    along = tl.sum(normed * scaled, axis=0) / hidden
    total = before + inverse * (scaled - normed * along)
    tl.store(sums, total.to(d_x.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=["token_stride", "head_stride", "cos_stride", "sin_stride", "rows"])
def norm_rotate_kernel(
    heads: tl.tensor,
    weight: tl.tensor,
    cos: tl.tensor,
    sin: tl.tensor,
    out: tl.tensor,
    token_stride: tl.tensor,
    head_stride: tl.tensor,
    cos_stride: tl.tensor,
    sin_stride: tl.tensor,
    rows: tl.tensor,
    eps: tl.tensor,
    count: tl.constexpr,
    unit: tl.constexpr,
    half: tl.constexpr,
    tile: tl.constexpr,
) -> None:
    """Compute `tile` of the `rows` heads of all tokens (`count` each), in their two halves."""
    row = tl.program_id(0) * tile + tl.arange(0, tile)
    column = tl.arange(0, half)[None, :]
    inside = (row < rows)[:, None]
    token, head = (row // count).to(tl.int64), (row % count).to(tl.int64)
    start = heads + (token * (token_stride * unit) + head * (head_stride * unit))[:, None]
    first = tl.load(start + column, mask=inside, other=0).to(tl.float32)
    second = tl.load(start + half + column, mask=inside, other=0).to(tl.float32)
    cosine = tl.load(cos + (token * (cos_stride * unit))[:, None] + column, mask=inside, other=0)
    sine = tl.load(sin + (token * (sin_stride * unit))[:, None] + column, mask=inside, other=0)

    squares = tl.sum(first * first + second * second, axis=1)
    inverse = tl.rsqrt(squares / (2 * half) + eps)[:, None]
    first = first * inverse * tl.load(weight + column).to(tl.float32)
    second = second * inverse * tl.load(weight + half + column).to(tl.float32)
    target = out + (row.to(tl.int64) * (2 * half))[:, None]
    kind = out.dtype.element_ty
    tl.store(target + column, (first * cosine - second * sine).to(kind), mask=inside)
    tl.store(target + half + column, (second * cosine + first * sine).to(kind), mask=inside)


@triton.jit(
    do_not_specialize=[
        "d_token_stride",
        "d_head_stride",
        "token_stride",
        "head_stride",
        "cos_stride",
        "sin_stride",
        "rows",
    ]
)
def norm_rotate_backward_kernel(
    d_out: tl.tensor,
    heads: tl.tensor,
    weight: tl.tensor,
    cos: tl.tensor,
    sin: tl.tensor,
    d_token_stride: tl.tensor,
    d_head_stride: tl.tensor,
    token_stride: tl.tensor,
    head_stride: tl.tensor,
    cos_stride: tl.tensor,
    sin_stride: tl.tensor,
    rows: tl.tensor,
    eps: tl.tensor,
    count: tl.constexpr,
    unit: tl.constexpr,
    half: tl.constexpr,
    tile: tl.constexpr,
) -> None:
    """Compute tiles as in `norm_rotate_kernel`."""
    row = tl.program_id(0) * tile + tl.arange(0, tile)
    column = tl.arange(0, half)[None, :]
    inside = (row < rows)[:, None]
    token, head = (row // count).to(tl.int64), (row % count).to(tl.int64)
    start = heads + (token * (token_stride * unit) + head * (head_stride * unit))[:, None]
    first = tl.load(start + column, mask=inside, other=0).to(tl.float32)
    second = tl.load(start + half + column, mask=inside, other=0).to(tl.float32)
    d_start = d_out + (token * (d_token_stride * unit) + head * (d_head_stride * unit))[:, None]
    d_first = tl.load(d_start + column, mask=inside, other=0).to(tl.float32)
    d_second = tl.load(d_start + half + column, mask=inside, other=0).to(tl.float32)
    cosine = tl.load(cos + (token * (cos_stride * unit))[:, None] + column, mask=inside, other=0)
    sine = tl.load(sin + (token * (sin_stride * unit))[:, None] + column, mask=inside, other=0)

    # The transposed rotation, then the gradient of the norm as in `rms_norm_backward_kernel`.
    scaled_first = d_first * cosine + d_second * sine
    scaled_second = d_second * cosine - d_first * sine
    scaled_first *= tl.load(weight + column).to(tl.float32)
    scaled_second *= tl.load(weight + half + column).to(tl.float32)
    squares = tl.sum(first * first + second * second, axis=1)
    inverse = tl.rsqrt(squares / (2 * half) + eps)[:, None]
    first, second = first * inverse, second * inverse
    along = tl.sum(first * scaled_first + second * scaled_second, axis=1)[:, None] / (2 * half)
    kind = heads.dtype.element_ty
    tl.store(start + column, (inverse * (scaled_first - first * along)).to(kind), mask=inside)
    d_second = inverse * (scaled_second - second * along)
    tl.store(start + half + column, d_second.to(kind), mask=inside)


@triton.jit(do_not_specialize=["stride", "out_stride"])
def silu_mul_kernel(
    gate_up: tl.tensor,
    out: tl.tensor,
    stride: tl.tensor,
    out_stride: tl.tensor,
    size: tl.constexpr,
    tiles: tl.constexpr,
    unit: tl.constexpr,
    tile: tl.constexpr,
) -> None:
    """Compute one of the `tiles` of a row, whose gate is `size` wide."""
    row = (tl.program_id(0) // tiles).to(tl.int64)
    column = tl.program_id(0) % tiles * tile + tl.arange(0, tile)
    inside = column < size
    source = gate_up + row * (stride * unit) + column
    gate = tl.load(source, mask=inside, other=0).to(tl.float32)
    up = tl.load(source + size, mask=inside, other=0).to(tl.float32)
    value = gate * tl.sigmoid(gate) * up
    tl.store(out + row * (out_stride * unit) + column, value.to(out.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=["d_out_stride", "stride"])
def silu_mul_backward_kernel(
    d_out: tl.tensor,
    gate_up: tl.tensor,
    d_out_stride: tl.tensor,
    stride: tl.tensor,
    size: tl.constexpr,
    tiles: tl.constexpr,
    unit: tl.constexpr,
    tile: tl.constexpr,
) -> None:
    """Compute tiles as in `silu_mul_kernel`."""
    row = (tl.program_id(0) // tiles).to(tl.int64)
    column = tl.program_id(0) % tiles * tile + tl.arange(0, tile)
    inside = column < size
    source = gate_up + row * (stride * unit) + column
    target = d_out + row * (d_out_stride * unit) + column
    gate = tl.load(source, mask=inside, other=0).to(tl.float32)
    up = tl.load(source + size, mask=inside, other=0).to(tl.float32)
    gradient = tl.load(target, mask=inside, other=0).to(tl.float32)

    sigmoid = tl.sigmoid(gate)
    silu = gate * sigmoid
    d_gate = gradient * up * (sigmoid + silu * (1 - sigmoid))
    tl.store(target, (silu * up).to(d_out.dtype.element_ty), mask=inside)
    tl.store(source, d_gate.to(gate_up.dtype.element_ty), mask=inside)
    tl.store(source + size, (gradient * silu).to(gate_up.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=["stride"])
def cross_entropy_kernel(
    logits: tl.tensor,
    targets: tl.tensor,
    losses: tl.tensor,
    stride: tl.tensor,
    vocabulary: tl.constexpr,
    unit: tl.constexpr,
    steps: tl.constexpr,
    tile: tl.constexpr,
) -> None:
    """Compute one row, in `steps` of `tile` times eight numbers."""
    row = tl.program_id(0).to(tl.int64)
    start = logits + row * (stride * unit)
    target = tl.load(targets + row)
    chosen = tl.load(start + target).to(tl.float32)
    column = tl.arange(0, tile)[:, None] * 8 + tl.arange(0, 8)[None, :]

    # Eight neighbours lie in one thread, which keeps its own maximum and sum: threads synchronise
    # once a row. The first maximum is finite, so that an empty step does not subtract infinities.
    most = tl.full((tile,), -3.0e38, tl.float32)
    total = tl.zeros((tile,), tl.float32)
    for step in range(steps):
        at = step * tile * 8 + column
        value = tl.load(start + at, mask=at < vocabulary, other=float("-inf")).to(tl.float32)
        higher = tl.maximum(most, tl.max(value, axis=1))
        total = total * tl.exp(most - higher) + tl.sum(tl.exp(value - higher[:, None]), axis=1)
        most = higher
    highest = tl.max(most, axis=0)
    mass = tl.sum(total * tl.exp(most - highest), axis=0)
    tl.store(losses + row, (highest - chosen) + tl.log(mass))

    # Backwards, because what was read last is still in the cache.
    inverse = 1 / mass
    for back in range(steps):
        at = (steps - 1 - back) * tile * 8 + column
        value = tl.load(start + at, mask=at < vocabulary, other=0).to(tl.float32)
        share = tl.exp(value - highest) * inverse - tl.where(at == target, 1.0, 0.0)
        tl.store(start + at, share.to(logits.dtype.element_ty), mask=at < vocabulary)
