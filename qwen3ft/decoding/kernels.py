"""`SlotAttention` as Triton kernels: one pass over the cache for each slot and key-value head.

The sum over an answer's tokens is never split between programs, so its order, and with it every
bit of the result, depends on that answer alone.
"""

# mypy: disable-error-code="untyped-decorator"
from __future__ import annotations

import math

import triton
import triton.language as tl
from torch import Tensor

from qwen3ft.decoding.attention import HeadNorms, Slots
from qwen3ft.planning.decoder_sizes import PAGE_TOKENS
from qwen3ft.training.fused.launch import launch

_READ_TOKENS = 64  # of an answer, by a program at a time
_LEAST_DOT = 16  # fewest rows of a matrix product in Triton


class TritonAttention:
    """`SlotAttention` on a GPU; head_dim is a power of two from 16 on."""

    def enter(
        self, qkv: Tensor, norms: HeadNorms, slots: Slots, keys: Tensor, values: Tensor
    ) -> Tensor:
        """Norm, rotate and write, in one launch."""
        _, count, head_dim = keys.shape
        heads = qkv.shape[1] // head_dim
        queries = heads - 2 * count
        q = qkv.new_empty(len(qkv), queries, head_dim)
        tile = max(1, 2048 // head_dim)
        launch(
            _enter_kernel,
            (len(qkv), triton.cdiv(heads, tile), 1),
            (
                *(qkv, norms.query, norms.key, slots.cos, slots.sin, slots.positions, slots.pages),
                *(q, keys, values),
            ),
            (slots.pages.stride(0), norms.eps),
            (queries, count, head_dim // 2, tile, PAGE_TOKENS),
            num_warps=4,
        )
        return q

    def attend(self, q: Tensor, slots: Slots, keys: Tensor, values: Tensor, out: Tensor) -> None:
        """Attend, a program for each slot and key-value head."""
        _, count, head_dim = keys.shape
        group = q.shape[1] // count
        launch(
            _attend_kernel,
            (len(q), count, 1),
            (q, keys, values, slots.positions, slots.pages, out),
            (slots.pages.stride(0), out.stride(0), 1 / math.sqrt(head_dim)),
            (
                *(count, group, max(_LEAST_DOT, triton.next_power_of_2(group)), head_dim),
                *(PAGE_TOKENS, _READ_TOKENS),
            ),
            num_warps=4,
        )


@triton.jit(do_not_specialize=["page_stride"])
def _enter_kernel(
    qkv: tl.tensor,
    q_weight: tl.tensor,
    k_weight: tl.tensor,
    cos: tl.tensor,
    sin: tl.tensor,
    positions: tl.tensor,
    pages: tl.tensor,
    q: tl.tensor,
    keys: tl.tensor,
    values: tl.tensor,
    page_stride: tl.tensor,
    eps: tl.tensor,
    queries: tl.constexpr,
    count: tl.constexpr,
    half: tl.constexpr,
    tile: tl.constexpr,
    page_tokens: tl.constexpr,
) -> None:
    """Compute `tile` heads of one slot, in their two halves."""
    slot = tl.program_id(0).to(tl.int64)
    head = (tl.program_id(1) * tile + tl.arange(0, tile))[:, None]
    column = tl.arange(0, half)[None, :]
    total: tl.constexpr = queries + 2 * count
    start = qkv + (slot * total + head) * (2 * half) + column
    raw_first = tl.load(start, mask=head < total, other=0)
    raw_second = tl.load(start + half, mask=head < total, other=0)
    cosine = tl.load(cos + slot * half + column)
    sine = tl.load(sin + slot * half + column)

    first, second = raw_first.to(tl.float32), raw_second.to(tl.float32)
    squares = tl.sum(first * first + second * second, axis=1)
    inverse = tl.rsqrt(squares / (2 * half) + eps)[:, None]
    is_query = head < queries
    q_first, q_second = tl.load(q_weight + column), tl.load(q_weight + half + column)
    k_first, k_second = tl.load(k_weight + column), tl.load(k_weight + half + column)
    first *= inverse * tl.where(is_query, q_first, k_first).to(tl.float32)
    second *= inverse * tl.where(is_query, q_second, k_second).to(tl.float32)
    kind = q.dtype.element_ty
    rotated_first = (first * cosine - second * sine).to(kind)
    rotated_second = (second * cosine + first * sine).to(kind)

    target = q + (slot * queries + head) * (2 * half) + column
    tl.store(target, rotated_first, mask=is_query)
    tl.store(target + half, rotated_second, mask=is_query)
    position = tl.load(positions + slot)
    page = tl.load(pages + slot * page_stride + position // page_tokens).to(tl.int64)
    place = page * page_tokens + position % page_tokens
    is_key = (head >= queries) & (head < queries + count)
    target = keys + (place * count + head - queries) * (2 * half) + column
    tl.store(target, rotated_first, mask=is_key)
    tl.store(target + half, rotated_second, mask=is_key)
    is_value = (head >= queries + count) & (head < total)
    target = values + (place * count + head - queries - count) * (2 * half) + column
    tl.store(target, raw_first, mask=is_value)
    tl.store(target + half, raw_second, mask=is_value)


@triton.jit(do_not_specialize=["page_stride", "out_stride", "scale"])
def _attend_kernel(
    q: tl.tensor,
    keys: tl.tensor,
    values: tl.tensor,
    positions: tl.tensor,
    pages: tl.tensor,
    out: tl.tensor,
    page_stride: tl.tensor,
    out_stride: tl.tensor,
    scale: tl.tensor,
    count: tl.constexpr,
    group: tl.constexpr,
    padded: tl.constexpr,
    head_dim: tl.constexpr,
    page_tokens: tl.constexpr,
    tile: tl.constexpr,
) -> None:
    """Compute the query heads of one key-value head of one slot, with a running softmax."""
    slot, head = tl.program_id(0).to(tl.int64), tl.program_id(1)
    tokens = tl.load(positions + slot) + 1
    member, column = tl.arange(0, padded), tl.arange(0, head_dim)
    mine = (member < group)[:, None]
    queries = (head * group + member)[:, None] * head_dim + column[None, :]
    query = tl.load(q + slot * (count * group * head_dim) + queries, mask=mine, other=0)
    top = tl.full([padded], float("-inf"), tl.float32)
    total = tl.zeros([padded], tl.float32)
    sums = tl.zeros([padded, head_dim], tl.float32)
    for start in range(0, tokens, tile):
        token = start + tl.arange(0, tile)
        known = token < tokens
        page = tl.load(pages + slot * page_stride + token // page_tokens, mask=known, other=0)
        place = page.to(tl.int64) * page_tokens + token % page_tokens
        address = (place * count + head) * head_dim
        key = tl.load(keys + address[None, :] + column[:, None], mask=known[None, :], other=0)
        scores = tl.dot(query, key, input_precision="ieee") * scale
        scores = tl.where(known[None, :], scores, float("-inf"))
        higher = tl.maximum(top, tl.max(scores, axis=1))
        shrink = tl.exp(top - higher)
        weight = tl.exp(scores - higher[:, None])
        total = total * shrink + tl.sum(weight, axis=1)
        value = tl.load(values + address[:, None] + column[None, :], mask=known[:, None], other=0)
        product = tl.dot(weight.to(value.dtype), value, input_precision="ieee")
        sums = sums * shrink[:, None] + product
        top = higher
    result = (sums / total[:, None]).to(out.dtype.element_ty)
    tl.store(out + slot * out_stride + queries, result, mask=mine)
