"""One Qwen3 block for decoding: a packed row of prompts, or one new token in each slot.

The same mathematics as `qwen3ft.training.fused.block`, without what a backward pass would need.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from qwen3ft.decoding.attention import HeadNorms, SlotAttention, Slots
from qwen3ft.decoding.cache import PagedCache
from qwen3ft.decoding.projections import Foreign, Scratch, SwitchedProjection
from qwen3ft.training.fused.attention import Segments, attend
from qwen3ft.training.fused.ops import ElementWise


@dataclass(frozen=True)
class PackedTexts:
    """A packed row of T tokens of several texts; T is a multiple of `chunk_tokens`.

    Attributes:
        segments: The texts.
        cos: fp32, (T, head_dim / 2).
        sin: fp32, (T, head_dim / 2).
        chunks: Masks of each chunk of `chunk_tokens` tokens.
        chunk_tokens: Rows of each matrix product: always the same, so that a text's numbers do not
            depend on those beside it.
        places: Where the cache keeps each token, int64, (T,).
    """

    segments: Segments
    cos: Tensor
    sin: Tensor
    chunks: Sequence[Foreign]
    chunk_tokens: int
    places: Tensor

    def parts(self) -> Iterator[tuple[slice, Foreign]]:
        """Yield each chunk's tokens and masks."""
        for index, masks in enumerate(self.chunks):
            yield slice(index * self.chunk_tokens, (index + 1) * self.chunk_tokens), masks


class DecoderBlock:
    """Forward of `block`, a `Qwen3DecoderLayer` on 4-bit weights.

    Args:
        block: The layer, with or without PEFT's adapters.
        names: Adapters between which rows choose.
        ops: Element-wise functions for its device.
        attention: Attention over the cache, for the same device.
        scratch: Memory for dequantised weights.
    """

    def __init__(
        self,
        block: Any,
        names: Sequence[str],
        ops: ElementWise,
        attention: SlotAttention,
        scratch: Scratch,
    ) -> None:
        mixer, mlp = block.self_attn, block.mlp
        self.ops, self.attention = ops, attention

        def projection(*modules: Any) -> SwitchedProjection:
            return SwitchedProjection(list(modules), names, ops, scratch)

        self.qkv = projection(mixer.q_proj, mixer.k_proj, mixer.v_proj)
        self.o = projection(mixer.o_proj)
        self.gate_up = projection(mlp.gate_proj, mlp.up_proj)
        self.down = projection(mlp.down_proj)
        self.norm, self.mlp_norm = block.input_layernorm, block.post_attention_layernorm
        self.head_norms = HeadNorms.of(mixer)
        self.head_dim = mixer.head_dim
        self.query_heads, self.key_heads, _ = (
            weight.out_features // self.head_dim for weight in self.qkv.weights
        )

    @property
    def projections(self) -> tuple[SwitchedProjection, ...]:
        """All projections, in the order of their use."""
        return self.qkv, self.o, self.gate_up, self.down

    def step(self, x: Tensor, slots: Slots, foreign: Foreign, keys: Tensor, values: Tensor) -> None:
        """Overwrite `x`, one token of each slot, (slots, hidden), with the block's output."""
        qkv = self.qkv.product(self._normed(self.norm, x, self.qkv), foreign)
        q = self.attention.enter(qkv, self.head_norms, slots, keys, values)
        extended = self.o.new_input(len(x))
        self.attention.attend(q, slots, keys, values, extended[:, : self.o.in_features])
        self.o.product(extended, foreign, residual=x, out=x)
        self._mlp(x, foreign)

    def packed(self, x: Tensor, texts: PackedTexts, cache: PagedCache, index: int) -> None:
        """Overwrite `x`, the packed tokens, (T, hidden), with the output of this block `index`."""
        qkv = x.new_empty(len(x), self.qkv.out_features)
        for part, foreign in texts.parts():
            normed = self._normed(self.norm, x[part], self.qkv)
            self.qkv.product(normed, foreign, out=qkv[part])
        heads = qkv.view(len(qkv), -1, self.head_dim)
        keys = self.query_heads + self.key_heads
        q, k, v = heads[:, : self.query_heads], heads[:, self.query_heads : keys], heads[:, keys:]
        norms, cos, sin = self.head_norms, texts.cos, texts.sin
        q = self.ops.norm_rotate(q, norms.query, cos, sin, norms.eps)
        k = self.ops.norm_rotate(k, norms.key, cos, sin, norms.eps)
        cache.write(index, texts.places, k, v)
        attended, _ = attend(q, k, v, texts.segments)
        for part, foreign in texts.parts():
            extended = self.o.new_input(texts.chunk_tokens)
            extended[:, : self.o.in_features] = attended[part].flatten(1)
            self.o.product(extended, foreign, residual=x[part], out=x[part])
        for part, foreign in texts.parts():
            self._mlp(x[part], foreign)

    def _mlp(self, x: Tensor, foreign: Foreign) -> None:
        """Add the MLP's output to `x`."""
        gate_up = self.gate_up.product(self._normed(self.mlp_norm, x, self.gate_up), foreign)
        activated = self.down.new_input(len(x))
        self.ops.silu_mul(gate_up, activated[:, : self.down.in_features])
        self.down.product(activated, foreign, residual=x, out=x)

    def _normed(self, norm: Any, x: Tensor, projection: SwitchedProjection) -> Tensor:
        """Return norm(x) as the input of `projection`."""
        extended = projection.new_input(len(x))
        normed = extended[:, : projection.in_features]
        self.ops.rms_norm(x, norm.weight, norm.variance_epsilon, normed)
        return extended
