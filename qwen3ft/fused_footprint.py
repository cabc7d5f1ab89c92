"""What a step of the fused path takes beside the model: bytes by part, and which levels fit.

Guarantees: pure arithmetic, no torch. Tensors of `qwen3ft.fused.block` are counted as they live and
die there (c: bytes of the compute type; T: tokens of the packed row; W: of a chunk of it; H, I, Q,
K: hidden and MLP size, features of all query / key-value heads; g: head groups; r: padded ranks):

    weights        c (3 H I + r (2 I + I))             gate, up and down dequantised at one time
    throughout     c T (H + r) + 8 T head_dim / 2      gradient of the residual stream; cos and sin
    MLP            c W (3 I + 2 (H + r)) + c T H       gate and up, activated, normed, its gradient
    attention      c T (Q + (9 Q + 4 K) / g)           gradient of the output; per group: q, k, their
                                                       gradients, one of k and v per query head, and
                                                       FlashAttention's sum of dq in fp32
    what a level drops and the backward makes again
    loss           c V x chunk                         logits, overwritten by their gradient
"""

from __future__ import annotations

from dataclasses import dataclass

from qwen3ft.recompute import Level, choose_levels, kept_bytes_per_token, padded_rank
from qwen3ft.records import ModelShape


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
    """

    shape: ModelShape
    rank: int
    compute_bytes: int
    loss_chunk_tokens: int
    chunk_tokens: int
    head_groups: int
    offload: bool = False

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
        return tuple(
            kept_bytes_per_token(self.shape, self.rank, self.compute_bytes, level)
            for level in Level
        )

    def working_bytes(self, tokens: int, level: Level) -> int:
        """The most that comes and goes while a row of `tokens` runs at `level` or finer."""
        shape, c = self.shape, self.compute_bytes
        query, key = _features(shape)
        hidden, inner = shape.hidden_size, shape.intermediate_size
        low = padded_rank(3 * self.rank)
        chunk = min(tokens, self.chunk_tokens)
        throughout = c * tokens * (hidden + low) + 4 * tokens * shape.head_dim
        dropped_qkv = c * tokens * (query + 2 * key) if level >= Level.DROP_QKV else 0
        dropped_out = c * tokens * query if level >= Level.DROP_ALL else 0
        mlp = c * chunk * (3 * inner + 2 * (hidden + low)) + dropped_out
        if level >= Level.DROP_MIDDLE:
            mlp += c * tokens * hidden
        if level >= Level.DROP_ALL:
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
        else:
            kept = tokens * sum(per_token[level] for level in levels)
        return kept + self.working_bytes(tokens, max(levels))

    def levels(self, tokens: int, budget_bytes: int) -> tuple[Level, ...]:
        """Per block, what keeps most within `budget_bytes`; the most frugal if nothing fits."""
        blocks, per_token = self.shape.num_hidden_layers, self.kept_per_token()
        if self.offload:
            return (Level.DROP_MIDDLE,) * blocks
        for coarsest in Level:
            room = budget_bytes - self.working_bytes(tokens, coarsest)
            if blocks * tokens * per_token[coarsest] <= room:
                return choose_levels(per_token, tokens, blocks, room)
        return (Level.DROP_ALL,) * blocks

    def recomputed_share(self, levels: tuple[Level, ...], sequence_tokens: int) -> float:
        """Products computed again, as a share of those of forward and backward.

        Args:
            levels: Per block.
            sequence_tokens: Length of a typical sequence, which attention's cost depends on.
        """
        shape = self.shape
        query, key = _features(shape)
        attention = query * sequence_tokens  # causal: half of 2 x 2 x tokens x features
        costs = {
            Level.DROP_GATE_UP: 4 * shape.hidden_size * shape.intermediate_size,
            Level.DROP_QKV: 2 * shape.hidden_size * (query + 2 * key),
            Level.DROP_MIDDLE: 2 * shape.hidden_size * query,
            Level.DROP_ALL: 2 * attention,
        }
        linear = 2 * shape.linear_parameters // shape.num_hidden_layers
        whole = len(levels) * (2 * linear + 7 * attention)
        again = sum(cost for level in levels for at, cost in costs.items() if level >= at)
        return again / whole


def _features(shape: ModelShape) -> tuple[int, int]:
    """(of all query heads, of all key or value heads)."""
    return (
        shape.num_attention_heads * shape.head_dim,
        shape.num_key_value_heads * shape.head_dim,
    )
