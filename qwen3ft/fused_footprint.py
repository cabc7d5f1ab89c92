"""What a step of the fused path takes beside the model: bytes by part, and which levels fit.

Guarantees: pure arithmetic, no torch. Tensors of `qwen3ft.fused.block` are counted as they live and
die there (c: bytes of the compute type; T: tokens of the packed row; W: of a chunk of it; H, I, Q,
K: hidden and MLP size, features of all query / key-value heads; g: head groups; r: padded ranks):

    weights        c (3 H I + r (2 I + I))             gate, up and down dequantised at one time
    throughout    c T (2 H + r) + 4 T head_dim  the last block's output; gradient of the residual
                                                stream; cos and sin
    MLP           c W (3 I + 2 (H + r))         gate and up, activated; normed, its gradient
    attention     c T (Q + (7 Q + 4 K) / g)     gradient of the output; per group of heads: q, k and
                                                their gradients, those of k and v per query head,
                                                FlashAttention's sum of dq in fp32 (+ 2 Q / g where
                                                g > 1: output and its gradient, made dense)
    forward       c T (2 H + 2 Q + 2 K + (Q + K) / g)   (+ c T Q where g > 1)
    loss          c (V + 4 H) x chunk           logits, overwritten by their gradient

The largest of the last four counts, MLP and attention each with what a level drops and the backward
makes again.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from functools import lru_cache

from qwen3ft.recompute import (
    ON_DEVICE,
    Level,
    choose_levels,
    kept_bytes_per_token,
    offload_evenly,
    padded_rank,
)
from qwen3ft.records import GIB, MemoryPart, ModelShape

SLACK = (int(0.15 * GIB), 0.03)
"""What the allocator holds beyond what is in use: bytes, and a share of the row's."""


@dataclass(frozen=True)
class FusedSizes:
    """The settings of a fused step that memory depends on.

    Attributes:
        shape: Of the model.
        rank: Of the adapter.
        compute_bytes: Bytes of one number of the compute type.
        loss_chunk_tokens: Targets whose logits exist at one time.
        chunk_tokens: Tokens whose wide intermediates exist at one time.
        head_groups: In how many parts the gradient of attention is computed.
        offload: Whether what is kept waits in host memory.
        offload_attention: Whether attention's output is among it, instead of being dropped.
        offloaded_mlp_blocks: Most blocks whose gate and up wait in host memory instead of being
            computed again.
    """

    shape: ModelShape
    rank: int
    compute_bytes: int
    loss_chunk_tokens: int
    chunk_tokens: int
    head_groups: int
    offload: bool = False
    offload_attention: bool = False
    offloaded_mlp_blocks: int = 0

    @property
    def weight_bytes(self) -> int:
        """Dequantised matrices that exist at one time, with the adapters beside them."""
        shape, low = self.shape, padded_rank(2 * self.rank)
        matrices = 3 * shape.intermediate_size * (shape.hidden_size + low)
        return self.compute_bytes * matrices

    @property
    def adapter_bytes(self) -> int:
        """Adapters of all blocks in the compute type, with the zeros between and behind them."""
        shape = self.shape
        query, key = _features(shape)
        three, two, one = (padded_rank(n * self.rank) for n in (3, 2, 1))
        wide = three * (shape.hidden_size + query + 2 * key)
        wide += two * (shape.hidden_size + 2 * shape.intermediate_size)
        narrow = one * (2 * shape.hidden_size + query + shape.intermediate_size)
        return self.compute_bytes * shape.num_hidden_layers * (wide + narrow)

    def kept_per_token(self) -> tuple[int, ...]:
        """Bytes one block keeps per token at each level."""
        return _kept_per_token(self.shape, self.rank, self.compute_bytes)

    def working_bytes(self, tokens: int, level: Level) -> int:
        """The most that comes and goes while a row of `tokens` runs at `level` or finer."""
        shape, c = self.shape, self.compute_bytes
        query, key = _features(shape)
        hidden, inner = shape.hidden_size, shape.intermediate_size
        low = padded_rank(3 * self.rank)
        chunk = min(tokens, self.chunk_tokens)
        throughout = c * tokens * (2 * hidden + low) + 4 * tokens * shape.head_dim
        dropped_qkv = c * tokens * (query + 2 * key) if level >= Level.RECOMPUTE_QKV else 0
        dropped_out = c * tokens * query if level >= Level.RECOMPUTE_ALL else 0
        mlp = c * chunk * (3 * inner + 2 * (hidden + low)) + dropped_out
        if level >= Level.RECOMPUTE_O:
            mlp += c * tokens * hidden
        if level >= Level.RECOMPUTE_ALL:
            mlp += dropped_qkv
        per_group = 9 * query + 4 * key if self.head_groups > 1 else 7 * query + 4 * key
        attention = c * tokens * (query + per_group // self.head_groups) + dropped_qkv + dropped_out
        per_group = (query + key) // self.head_groups
        forward = c * tokens * (2 * hidden + 2 * query + 2 * key + per_group)
        if self.head_groups > 1:
            forward += c * tokens * query
        logits = min(self.loss_chunk_tokens, tokens)
        loss = c * logits * (shape.vocab_size + 4 * hidden)
        return throughout + max(mlp, attention, forward, loss)

    def row_bytes(self, tokens: int, levels: tuple[Level, ...]) -> int:
        """All of a row: what its blocks keep, and what comes and goes."""
        per_token = self.kept_per_token()
        if self.offload:
            # One block's tensors on their way out or in, beside those in use.
            kept = 2 * tokens * per_token[max(levels)]
            low = 2 * self.compute_bytes * padded_rank(self.rank)  # narrow ones stay
            kept += (len(levels) - 2) * tokens * low
        else:
            kept = tokens * sum(levels.count(level) * per_token[level] for level in set(levels))
            if Level.OFFLOAD_GATE_UP in levels:
                kept += self._on_its_way(tokens)
        return kept + self.working_bytes(tokens, max(levels))

    def levels(self, tokens: int, budget_bytes: int) -> tuple[Level, ...]:
        """Per block, what keeps most within `budget_bytes`; the most frugal if nothing fits."""
        blocks, per_token = self.shape.num_hidden_layers, self.kept_per_token()
        if self.offload:
            return (Level.RECOMPUTE_O if self.offload_attention else Level.RECOMPUTE_ALL,) * blocks
        for coarsest in ON_DEVICE:
            room = budget_bytes - self.working_bytes(tokens, coarsest)
            if blocks * tokens * per_token[coarsest] <= room:
                levels = choose_levels(per_token, tokens, blocks, room)
                if not self.offloaded_mlp_blocks or Level.RECOMPUTE_GATE_UP not in levels:
                    return levels
                less = choose_levels(per_token, tokens, blocks, room - self._on_its_way(tokens))
                sent = offload_evenly(less, self.offloaded_mlp_blocks)
                if self.row_bytes(tokens, sent) > budget_bytes:
                    return levels
                # What is on its way takes room too; that must be worth it.
                return min(levels, sent, key=lambda each: self.operations(tokens, each, 0))
        return (Level.RECOMPUTE_ALL,) * blocks

    def _on_its_way(self, tokens: int) -> int:
        """Gate and up that come back while those of another block are in use.

        The latter are in the MLP's own count only where it runs in one chunk.
        """
        gate_up = 2 * self.compute_bytes * self.shape.intermediate_size * tokens
        return gate_up if tokens <= self.chunk_tokens else 2 * gate_up

    def fixed_parts(self, trained: int) -> tuple[MemoryPart, ...]:
        """Those of the parts that no row changes which differ from the plain path's.

        Args:
            trained: Parameters of the adapter.
        """
        return (
            MemoryPart(
                name="dequantised layer",
                bytes=self.weight_bytes,
                formula="gate, up and down of one block, with their adapters",
            ),
            MemoryPart(
                name="adapter",
                bytes=4 * trained + self.adapter_bytes,
                formula=f"{trained:,} x 4 bytes, and padded copies in the compute type",
            ),
            MemoryPart(
                name="gradients",
                bytes=8 * trained,
                formula=f"{trained:,} x 4 bytes, and those of one micro-batch",
            ),
        )

    def row_parts(self, tokens: int, budget_bytes: int) -> tuple[MemoryPart, ...]:
        """The parts of the largest row, and what lies beside it.

        Args:
            tokens: Of the largest row.
            budget_bytes: What any row may take.
        """
        blocks = self.shape.num_hidden_layers
        levels = self.levels(tokens, budget_bytes)
        row, working = self.row_bytes(tokens, levels), self.working_bytes(tokens, max(levels))
        most = self.row_bytes(tokens, (Level.KEEP_ALL,) * blocks)
        rest = 0 if self.offload else max(0, min(budget_bytes, most) - row)
        slack_bytes, slack_share = SLACK
        again = Counter(level.repeats for level in sorted(levels))
        kept = ", ".join(f"{words} in {count} blocks" for words, count in again.items())
        return (
            MemoryPart(
                name="kept activations",
                bytes=row - working,
                formula=f"{tokens:,} tokens; computed again: {kept}"
                + ("; the rest waits in host memory" if self.offload else ""),
            ),
            MemoryPart(
                name="working memory",
                bytes=working,
                formula="largest of one block's MLP and attention, and a loss chunk",
            ),
            MemoryPart(
                name="kept of smaller rows",
                bytes=rest,
                formula="shorter rows keep more, up to the same sum",
            ),
            MemoryPart(
                name="allocator slack",
                bytes=slack_bytes + int(slack_share * (row + rest)),
                formula=f"{slack_bytes / GIB:.2f} GB and {slack_share:.0%} of the three above",
            ),
        )

    def operations(self, tokens: int, levels: tuple[Level, ...], sequence_tokens: int) -> float:
        """Floating-point operations of a row's forward and backward, those done again included.

        Products alone, 2 a multiplication; the frozen weights have no gradient.

        Args:
            tokens: Of the row.
            levels: Per block.
            sequence_tokens: Length of a typical sequence, which attention's cost depends on.
        """
        shape = self.shape
        query, key = _features(shape)
        attention = 2 * query * sequence_tokens  # causal: half of two products
        again = {
            Level.RECOMPUTE_GATE_UP: 4 * shape.hidden_size * shape.intermediate_size,
            Level.RECOMPUTE_QKV: 2 * shape.hidden_size * (query + 2 * key),
            Level.RECOMPUTE_O: 2 * shape.hidden_size * query,
            Level.RECOMPUTE_ALL: attention,
        }
        linear = 2 * linear_parameters(shape) // shape.num_hidden_layers
        blocks = len(levels) * (2 * linear + 3.5 * attention)
        for level in set(levels):
            repeated = sum(cost for at, cost in again.items() if level >= at)
            blocks += levels.count(level) * repeated
        return tokens * (blocks + 4 * shape.vocab_size * shape.hidden_size)


@lru_cache(maxsize=64)
def linear_parameters(shape: ModelShape) -> int:
    """Those of the shape, kept: a search for settings asks thousands of times."""
    return shape.linear_parameters


@lru_cache(maxsize=64)
def _kept_per_token(shape: ModelShape, rank: int, compute_bytes: int) -> tuple[int, ...]:
    return tuple(kept_bytes_per_token(shape, rank, compute_bytes, level) for level in Level)


def _features(shape: ModelShape) -> tuple[int, int]:
    """(of all query heads, of all key or value heads)."""
    return (
        shape.num_attention_heads * shape.head_dim,
        shape.num_key_value_heads * shape.head_dim,
    )
