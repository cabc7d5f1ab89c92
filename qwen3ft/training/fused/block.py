"""Forward and backward of one Qwen3 block over a packed row.

    x_mid = x + o(attend(rotate(norm(q)), rotate(norm(k)), v))     q, k, v = qkv(norm(x))
    y = x_mid + down(silu(gate) * up)                              gate, up = gate_up(norm(x_mid))

A level (`qwen3ft.planning.recompute`) determines what is kept. Norms, rotations and silu(gate) * up
are always recomputed: they are cheap and would take the most memory. All but attention is computed
for a chunk of tokens at a time, so the wide intermediates of a long row never exist whole.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from qwen3ft.planning.recompute import Level
from qwen3ft.training.fused.attention import Segments, attend, attend_backward
from qwen3ft.training.fused.kept import Kept
from qwen3ft.training.fused.ops import ElementWise
from qwen3ft.training.fused.projections import AdapterGradient, SharedInput, SingleProjection


@dataclass(frozen=True)
class PackedRow:
    """A packed row of T tokens, as all blocks see it; cos and sin are fp32, (T, head_dim / 2)."""

    segments: Segments
    cos: Tensor
    sin: Tensor
    chunk_tokens: int
    """Tokens whose wide intermediates exist at a time."""
    head_groups: int = 1
    """Parts in which attention is computed; divides the number of key-value heads."""

    def chunks(self) -> Iterator[slice]:
        """Yield slices of tokens, in order."""
        tokens = len(self.cos)
        for start in range(0, tokens, self.chunk_tokens):
            yield slice(start, min(start + self.chunk_tokens, tokens))


class FusedBlock:
    """Forward and backward of `block`, a `Qwen3DecoderLayer` with PEFT's adapters."""

    def __init__(self, block: Any, ops: ElementWise) -> None:
        attention, mlp = block.self_attn, block.mlp
        self.ops = ops
        self.qkv = SharedInput([attention.q_proj, attention.k_proj, attention.v_proj], ops)
        self.o = SingleProjection([attention.o_proj], ops)
        self.gate_up = SharedInput([mlp.gate_proj, mlp.up_proj], ops)
        self.down = SingleProjection([mlp.down_proj], ops)
        self.norm, self.mlp_norm = block.input_layernorm, block.post_attention_layernorm
        self.q_norm, self.k_norm = attention.q_norm, attention.k_norm
        self.head_dim = attention.head_dim
        self.query_heads, self.key_heads, _ = (
            weight.out_features // self.head_dim for weight in self.qkv.weights
        )

    @property
    def groups(self) -> tuple[SharedInput, SingleProjection, SharedInput, SingleProjection]:
        """Projections, in the order of the gradients of `backward`."""
        return self.qkv, self.o, self.gate_up, self.down

    def reserve(self, tokens: int, row: PackedRow, level: Level) -> Kept:
        """Allocate, uninitialised, what `level` keeps, except the output of attention."""
        # For all blocks before the first runs, so that the allocator has no holes between kept
        # tensors into which a larger one does not fit.
        new = self.qkv.a.new_empty
        kept = Kept(None)
        if level < Level.RECOMPUTE_O:
            kept.x_mid = new(tokens, self.o.out_features)
        if level < Level.RECOMPUTE_QKV:
            kept.qkv = new(tokens, self.qkv.out_features)
        if level == Level.KEEP_ALL:
            kept.gate_up = self.reserve_gate_up(row)
        return kept

    def reserve_gate_up(self, row: PackedRow) -> list[Tensor]:
        """Allocate gate and up of each chunk."""
        sizes = (chunk.stop - chunk.start for chunk in row.chunks())
        return [self.gate_up.a.new_empty(size, self.gate_up.out_features) for size in sizes]

    def forward(self, x: Tensor, row: PackedRow, level: Level, kept: Kept, out: Tensor) -> None:
        """Write the block's output into `out`, (T, hidden), and what `level` keeps into `kept`."""
        kept.x = x
        qkv = self._project(x, row, out=kept.qkv)
        attended, log_sum_exp = self._attend(qkv, row)
        del qkv  # unless it is kept, before o's product is allocated
        x_mid, kept.attended_low = self.o.forward(
            attended.flatten(1), self.o.weight(), x, out=kept.x_mid
        )
        if level < Level.RECOMPUTE_ALL:
            kept.attended, kept.log_sum_exp = attended, log_sum_exp
        del attended
        kept.activated_low = self._mlp(x_mid, row, kept.gate_up, out)

    def backward(self, d_extended: Tensor, kept: Kept, row: PackedRow) -> list[Tensor]:
        """Return the adapters' gradients in fp32, those of B without the factor s.

        Args:
            d_extended: Gradient of the output, (T, hidden + rank), with room for products with the
                adapters in the last columns; overwritten with the gradient of the input.
            kept: Tensors that `forward` kept; emptied.
            row: The packed row.
        """
        assert kept.x is not None
        if kept.attended is None:
            kept.qkv = self._project(kept.x, row)
            kept.attended, kept.log_sum_exp = self._attend(kept.qkv, row)
        if kept.x_mid is None:
            kept.x_mid, _ = self.o.forward(kept.attended.flatten(1), self.o.weight(), kept.x)
        mlp_gradients = self._mlp_backward(d_extended, kept, row)
        kept.x_mid = None  # `FusedSizes.backward_bytes` counts on its room
        if kept.qkv is None:
            kept.qkv = self._project(kept.x, row)
        o_total = self._attention_backward(d_extended, kept, row)
        weight, qkv_total = self.qkv.weight(), AdapterGradient()
        for chunk in row.chunks():
            extended = self._normed(self.norm, kept.x[chunk], self.qkv)
            d_normed = self.qkv.backward(kept.qkv[chunk], extended, weight, qkv_total)
            self._add_norm_gradient(self.norm, d_normed, kept.x[chunk], d_extended[chunk])
        kept.qkv = None
        return [*self.qkv.gradients(qkv_total), *self.o.gradients(o_total), *mlp_gradients]

    def _project(self, x: Tensor, row: PackedRow, out: Tensor | None = None) -> Tensor:
        """Return q, k and v, (T, features of all heads)."""
        weight = self.qkv.weight()
        qkv = x.new_empty(len(x), self.qkv.out_features) if out is None else out
        for chunk in row.chunks():
            self.qkv.forward(self._normed(self.norm, x[chunk], self.qkv), weight, out=qkv[chunk])
        return qkv

    def _normed(self, norm: Any, x: Tensor, group: SharedInput) -> Tensor:
        """Return norm(x) in the layout that `group` reads."""
        extended = group.new_input(len(x))
        self.ops.rms_norm(x, norm.weight, norm.variance_epsilon, extended[:, : group.in_features])
        group.extend(extended)
        return extended

    def _add_norm_gradient(
        self, norm: Any, d_normed: Tensor, x: Tensor, d_extended: Tensor
    ) -> None:
        d_x = d_extended[:, : x.shape[1]]
        self.ops.rms_norm_backward(d_normed, x, norm.weight, norm.variance_epsilon, d_x)

    def _attend(self, qkv: Tensor, row: PackedRow) -> tuple[Tensor, Tensor]:
        """Return attention's output, (T, query heads, head_dim), and log-sum-exp, (heads, T)."""
        groups = self._groups(row, *self._heads(qkv))
        parts = [self._attend_heads(q, k, v, row) for q, k, v in groups]
        if len(parts) == 1:
            return parts[0]
        outs, log_sum_exps = zip(*parts, strict=True)
        return torch.cat(outs, dim=1), torch.cat(log_sum_exps)

    def _attend_heads(
        self, q: Tensor, k: Tensor, v: Tensor, row: PackedRow
    ) -> tuple[Tensor, Tensor]:
        q, k = self._rotated(self.q_norm, q, row), self._rotated(self.k_norm, k, row)
        return attend(q, k, v, row.segments)

    def _groups(self, row: PackedRow, *heads: Tensor) -> Iterator[tuple[Tensor, ...]]:
        """Split tensors of (T, heads, head_dim) by heads into `row.head_groups` parts."""
        return zip(*(tensor.chunk(row.head_groups, dim=1) for tensor in heads), strict=True)

    def _heads(self, qkv: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return q, k and v as views of (T, heads, head_dim)."""
        heads = qkv.view(len(qkv), -1, self.head_dim)
        keys = self.query_heads + self.key_heads
        return heads[:, : self.query_heads], heads[:, self.query_heads : keys], heads[:, keys:]

    def _rotated(self, norm: Any, heads: Tensor, row: PackedRow) -> Tensor:
        return self.ops.norm_rotate(heads, norm.weight, row.cos, row.sin, norm.variance_epsilon)

    def _attention_backward(
        self, d_extended: Tensor, kept: Kept, row: PackedRow
    ) -> AdapterGradient:
        """Overwrite `kept.qkv` with its gradient; return that of o's adapter."""
        assert kept.qkv is not None
        assert kept.attended is not None
        assert kept.log_sum_exp is not None
        assert kept.attended_low is not None
        total = AdapterGradient()
        out, log_sum_exp = kept.attended, kept.log_sum_exp
        d_out = self.o.input_gradient(d_extended, self.o.weight())
        self.o.adapter_gradient(d_extended, out.flatten(1), kept.attended_low, total)
        kept.attended = kept.log_sum_exp = kept.attended_low = None
        d_out = d_out.view_as(out)
        groups = self._groups(row, d_out, out, *self._heads(kept.qkv))
        log_sum_exps = log_sum_exp.chunk(row.head_groups)
        for (d_out, out, q, k, v), exps in zip(groups, log_sum_exps, strict=True):
            d_q, d_k, d_v = attend_backward(
                d_out,
                self._rotated(self.q_norm, q, row),
                self._rotated(self.k_norm, k, row),
                v,
                out,
                exps,
                row.segments,
            )
            self._rotated_backward(self.q_norm, d_q, q, row)
            self._rotated_backward(self.k_norm, d_k, k, row)
            v.copy_(d_v)
        return total

    def _rotated_backward(self, norm: Any, d_out: Tensor, heads: Tensor, row: PackedRow) -> None:
        self.ops.norm_rotate_backward(
            d_out, heads, norm.weight, row.cos, row.sin, norm.variance_epsilon
        )

    def _mlp(self, x_mid: Tensor, row: PackedRow, kept: list[Tensor] | None, out: Tensor) -> Tensor:
        """Compute the MLP; return the products of its inner activation with down's A, (T, rank).

        Args:
            x_mid: Input, (T, hidden).
            row: The packed row.
            kept: Target for gate and up of each chunk; None to drop them.
            out: Target for the output, (T, hidden).
        """
        wide, narrow = self.gate_up.weight(), self.down.weight()
        lows = []
        for index, chunk in enumerate(row.chunks()):
            normed = self._normed(self.mlp_norm, x_mid[chunk], self.gate_up)
            gate_up = self.gate_up.forward(normed, wide, out=kept[index] if kept else None)
            del normed
            activated = gate_up.new_empty(len(gate_up), self.down.in_features)
            self.ops.silu_mul(gate_up, activated)
            del gate_up
            lows.append(self.down.forward(activated, narrow, x_mid[chunk], out=out[chunk])[1])
            del activated  # before that of the next chunk is allocated
        return lows[0] if len(lows) == 1 else torch.cat(lows)

    def _mlp_backward(self, d_extended: Tensor, kept: Kept, row: PackedRow) -> list[Tensor]:
        """Return the gradients of the MLP's adapters; turn `d_extended` into that of `x_mid`."""
        assert kept.x_mid is not None
        assert kept.activated_low is not None
        wide, narrow = self.gate_up.weight(), self.down.weight()
        wide_total, narrow_total = AdapterGradient(), AdapterGradient()
        for index, chunk in enumerate(row.chunks()):
            x_mid, d_chunk = kept.x_mid[chunk], d_extended[chunk]
            extended = self._normed(self.mlp_norm, x_mid, self.gate_up)
            if kept.gate_up is None:
                gate_up = self.gate_up.forward(extended, wide)
            else:
                # The list lets go of this chunk, so that it is freed before the next one.
                gate_up, kept.gate_up[index] = kept.gate_up[index], x_mid[:0]
            d_activated = self.down.input_gradient(d_chunk, narrow)
            self.ops.silu_mul_backward(d_activated, gate_up)
            activated, d_gate_up = d_activated, gate_up  # overwritten by these
            self.down.adapter_gradient(d_chunk, activated, kept.activated_low[chunk], narrow_total)
            del activated, d_activated
            d_normed = self.gate_up.backward(d_gate_up, extended, wide, wide_total)
            del d_gate_up, gate_up
            self._add_norm_gradient(self.mlp_norm, d_normed, x_mid, d_chunk)
            del extended, d_normed
        return [*self.gate_up.gradients(wide_total), *self.down.gradients(narrow_total)]
