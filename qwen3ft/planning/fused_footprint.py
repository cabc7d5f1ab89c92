"""What a step of the fused path takes beside the model: bytes by part, and which levels fit.

Guarantees: pure arithmetic, no torch. Tensors of `qwen3ft.training.fused.block` are counted as they
live and die there (c: bytes of the compute type; T: tokens of the packed row; W: of a chunk of it;
H, I, Q,
K: hidden and MLP size, features of all query / key-value heads; h: query heads; V: vocabulary; g:
head groups; r: padded ranks). Beside what blocks keep, and 4 T head_dim for cos and sin:

    attention, forward   c T (H + (Q + K) / g) + 4 h T         the block's output; q and k rotated
                         (+ c T Q where g > 1)                 its output, group by group
    MLP, forward         c T H + c W I                         the block's output; activated
    loss                 c T (2 H + r) + c n (V + 3 H)         the last block's output and its
                                                               gradient; logits of n targets
    MLP, backward        c T (H + r) + c W (H + r + I)         gradient of the residual stream;
                                                               normed; gradient of activated
    attention, backward  c T (H + r + Q + (6 Q + 3 K) / g) + 4 h T
                         gradient of the residual stream and of the output; per group of heads: q, k
                         and the gradients of all three, those of k and v per query head,
                         FlashAttention's sum of dq in fp32 (+ 2 Q / g where g > 1: output and its
                         gradient, made dense)

and what a level drops, where it exists again: q, k, v and the output of attention in both passes
of attention, all of them in an MLP's backward, its input, gate and up (2 c W I) in its own passes.
The MLP's passes have its dequantised matrices, c (3 H I + r (2 I + I)), which count as a part of
their own; in all others they are gone. A block's backward frees what it kept of its MLP before it
comes to its attention, and all of it before the next block's begins.

Held against peaks by part measured on an H100, 0.6B to 14B, 2,048 to 32,768 tokens
(a probe of the allocator within each part): apart from the workspaces of cuBLAS, within 0.02 GB.
"""

from __future__ import annotations

from bisect import bisect_right
from collections import Counter
from functools import lru_cache

from qwen3ft.planning.recompute import (
    ON_DEVICE,
    Level,
    kept_bytes_per_token,
    offload_evenly,
    padded_rank,
)
from qwen3ft.planning.workload import Workload
from qwen3ft.records.model import ModelShape
from qwen3ft.records.plan import MemoryPart
from qwen3ft.units import GIB, size_text


class FusedSizes:
    """Bytes and operations of a fused step over packed rows of a workload's model."""

    def __init__(self, work: Workload) -> None:
        self.work, self.shape, self.memory = work, work.shape, work.memory
        self.rank, self.compute_bytes = work.adapter.r, work.compute_bytes

    @property
    def weight_bytes(self) -> int:
        """Dequantised matrices that exist at one time, with the adapters beside them."""
        shape, low = self.shape, padded_rank(2 * self.rank)
        matrices = 3 * shape.intermediate_size * (shape.hidden_size + low)
        return self.compute_bytes * matrices

    @property
    def frugal_levels(self) -> tuple[Level, ...]:
        """The levels that keep least."""
        level = Level.RECOMPUTE_O if self.memory.offload_attention else Level.RECOMPUTE_ALL
        return (level,) * self.shape.num_hidden_layers

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

    def forward_bytes(self, tokens: int, level: Level) -> int:
        """The most that comes and goes in a block's forward over a row of `tokens` at `level`."""
        c, hidden = self.compute_bytes, self.shape.hidden_size
        query, key = _features(self.shape)
        drops = level == Level.RECOMPUTE_ALL
        attention = hidden + (query + key) // self.memory.head_groups
        attention += query * (drops + (self.memory.head_groups > 1))
        attention += query + 2 * key if level >= Level.RECOMPUTE_QKV else 0
        mlp = 2 * hidden if level >= Level.RECOMPUTE_O else hidden
        return max(
            c * tokens * attention + self._log_sum_exp_bytes(tokens) - self.weight_bytes,
            c * tokens * mlp + self._wide_bytes(tokens, level),
        )

    def loss_bytes(self, tokens: int, *, with_gradient: bool = True) -> int:
        """The most that comes and goes in the loss of a row."""
        c, hidden = self.compute_bytes, self.shape.hidden_size
        stream = 2 * hidden + padded_rank(self.rank) if with_gradient else hidden
        targets = min(self.memory.loss_chunk_tokens, tokens)
        chunk = targets * (self.shape.vocab_size + 3 * hidden)
        return c * (tokens * stream + chunk) - self.weight_bytes

    def backward_bytes(self, tokens: int, level: Level) -> int:
        """The most that comes and goes in a block's backward; what it has freed is taken off."""
        c, hidden = self.compute_bytes, self.shape.hidden_size
        inner, low = self.shape.intermediate_size, padded_rank(self.rank)
        query, key = _features(self.shape)
        again = query if level == Level.RECOMPUTE_ALL else 0
        of_mlp = again + (query + 2 * key if level == Level.RECOMPUTE_ALL else 0)
        of_mlp += hidden if level >= Level.RECOMPUTE_O else 0
        chunk = min(tokens, self.memory.chunk_tokens) * (hidden + padded_rank(2 * self.rank))
        mlp = c * (tokens * (hidden + low + of_mlp) + chunk) + self._wide_bytes(tokens, level)
        of_attention = again + (query + 2 * key if level >= Level.RECOMPUTE_QKV else 0)
        of_attention -= hidden if level < Level.RECOMPUTE_O else 0
        of_attention -= 2 * inner if level == Level.KEEP_ALL else 0
        per_group = (8 if self.memory.head_groups > 1 else 6) * query + 3 * key
        of_attention += hidden + low + query + per_group // self.memory.head_groups
        attention = c * tokens * of_attention + self._log_sum_exp_bytes(tokens) - self.weight_bytes
        return max(mlp, attention)

    def _wide_bytes(self, tokens: int, level: Level) -> int:
        """The MLP's wide tensors of a chunk: activated, and gate and up where they are dropped."""
        wide = 1 if level == Level.KEEP_ALL else 3
        chunk = min(tokens, self.memory.chunk_tokens)
        return self.compute_bytes * chunk * wide * self.shape.intermediate_size

    def _log_sum_exp_bytes(self, tokens: int) -> int:
        """A number in fp32 for each query of each head: of log-sum-exp, or for its gradient."""
        return 4 * self.shape.num_attention_heads * tokens

    def evaluation_bytes(self, tokens: int) -> int:
        """The most that an evaluation of a row takes, which keeps nothing."""
        block = self.compute_bytes * tokens * self.shape.hidden_size
        block += self.forward_bytes(tokens, Level.RECOMPUTE_ALL)
        return self._rotary_bytes(tokens) + max(block, self.loss_bytes(tokens, with_gradient=False))

    def _rotary_bytes(self, tokens: int) -> int:
        """Of a row's cos and sin."""
        return 4 * tokens * self.shape.head_dim

    def row_bytes(self, tokens: int, levels: tuple[Level, ...]) -> int:
        """The most that a row takes at once: what its blocks keep, and what comes and goes.

        Args:
            tokens: Of the row.
            levels: Per block.
        """
        kept = self.kept_bytes(tokens, levels)
        peaks = [kept + self.forward_bytes(tokens, max(levels)), kept + self.loss_bytes(tokens)]
        per_token = self.kept_per_token()
        freed, before = 0, len(levels)
        for level in dict.fromkeys(reversed(levels)):  # backward begins at the last block
            last = len(levels) - levels[::-1].index(level)
            if not self.memory.offload_activations:
                freed += tokens * sum(per_token[each] for each in levels[last:before])
                before = last
            peaks.append(kept - freed + self.backward_bytes(tokens, level))
        return self._rotary_bytes(tokens) + max(peaks)

    def kept_bytes(self, tokens: int, levels: tuple[Level, ...]) -> int:
        """What all blocks keep of a row on the device, once all have run."""
        per_token = self.kept_per_token()
        if self.memory.offload_activations:
            # One block's tensors on their way out or in, beside those in use.
            kept = 2 * tokens * per_token[max(levels)]
            low = 2 * self.compute_bytes * padded_rank(self.rank)  # narrow ones stay
            return kept + (len(levels) - 2) * tokens * low
        kept = tokens * sum(levels.count(level) * per_token[level] for level in set(levels))
        return kept + (self._on_its_way(tokens) if Level.OFFLOAD_GATE_UP in levels else 0)

    def levels(self, tokens: int, budget_bytes: int) -> tuple[Level, ...]:
        """Per block, what keeps most within `budget_bytes`; the most frugal if nothing fits."""
        if self.memory.offload_activations:
            return self.frugal_levels
        levels = self._filled(tokens, budget_bytes)
        if not self.memory.offloaded_mlp_blocks or Level.RECOMPUTE_GATE_UP not in levels:
            return levels
        less = self._filled(tokens, budget_bytes - self._on_its_way(tokens))
        sent = offload_evenly(less, self.memory.offloaded_mlp_blocks)
        if self.row_bytes(tokens, sent) > budget_bytes:
            return levels
        # What is on its way takes room too; that must be worth it.
        return min(levels, sent, key=lambda each: self.operations(tokens, each, 0))

    def _filled(self, tokens: int, budget_bytes: int) -> tuple[Level, ...]:
        """All blocks at the finest level that fits, and as many at the next as there is room for.

        Each level frees its bytes at about the same cost, so no mix of more than two is faster.
        """
        blocks = self.shape.num_hidden_layers
        finer = None
        for level in ON_DEVICE:
            if self.row_bytes(tokens, (level,) * blocks) <= budget_bytes:
                break
            finer = level
        if finer is None or level == finer:
            return (level,) * blocks

        def mixed(richer: int) -> tuple[Level, ...]:
            return (level,) * (blocks - richer) + (finer,) * richer

        fitting = bisect_right(
            range(1, blocks), budget_bytes, key=lambda n: self.row_bytes(tokens, mixed(n))
        )
        return mixed(fitting)

    def _on_its_way(self, tokens: int) -> int:
        """Gate and up that come back while those of another block are in use.

        The latter are in the MLP's own count only where it runs in one chunk.
        """
        gate_up = 2 * self.compute_bytes * self.shape.intermediate_size * tokens
        return gate_up if tokens <= self.memory.chunk_tokens else 2 * gate_up

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


WORKSPACE_BYTES = 2**26
"""What cuBLAS holds for the threads of forward and backward on Hopper; less on older cards."""

LEAN_WORKSPACE_BYTES = 2**24
"""The same where `qwen3ft.machine.memory` asks it for as little as on those."""

SLACK_BYTES = int(0.08 * GIB)
"""What the allocator holds at least beyond what is in use."""

SLACK_SHARE, VARIED_SLACK_SHARE = 0.08, 0.2
"""The same as a share of what comes and goes: for rows of one length, and for rows of different
ones, each of which fits less well into the place of the last."""


def fixed_parts(sizes: FusedSizes) -> tuple[MemoryPart, ...]:
    """The parts that no budget changes which differ from the plain path's."""
    work, trained = sizes.work, sizes.work.adapter.trainable_parameters
    # The gradients of a micro-batch come as what blocks keep goes.
    offload = work.memory.offload_activations
    going = 0 if offload else sizes.kept_bytes(work.tokens, sizes.frugal_levels)
    own = max(0, 4 * trained - going)
    return (
        MemoryPart(
            name="dequantised layer",
            bytes=sizes.weight_bytes,
            formula="gate, up and down of one block, with their adapters",
        ),
        MemoryPart(
            name="adapter",
            bytes=4 * trained + sizes.adapter_bytes,
            formula=f"{trained:,} x 4 bytes, and padded copies in the compute type",
        ),
        MemoryPart(
            name="gradients",
            bytes=4 * trained + own,
            formula=f"{trained:,} x 4 bytes, and those of one micro-batch beyond what is kept",
        ),
    )


def row_parts(sizes: FusedSizes) -> tuple[MemoryPart, ...]:
    """The parts of the largest row, and what lies beside it."""
    work, memory = sizes.work, sizes.work.memory
    tokens, budget_bytes = work.tokens, memory.activation_bytes
    blocks = work.shape.num_hidden_layers
    levels = sizes.levels(tokens, budget_bytes)
    row, kept_bytes = sizes.row_bytes(tokens, levels), sizes.kept_bytes(tokens, levels)
    most = sizes.row_bytes(tokens, (Level.KEEP_ALL,) * blocks)
    rest = 0 if memory.offload_activations else max(0, min(budget_bytes, most) - row)
    # Of the most frugal levels for any budget, so that the sum follows the budget.
    frugal = sizes.frugal_levels
    passing = sizes.row_bytes(tokens, frugal) - sizes.kept_bytes(tokens, frugal)
    beside = SLACK_BYTES + (LEAN_WORKSPACE_BYTES if memory.offload_optimizer else WORKSPACE_BYTES)
    if memory.offloaded_mlp_blocks:  # gate and up come and go between what stays
        chunk = min(tokens, memory.chunk_tokens)
        beside += 2 * work.compute_bytes * work.shape.intermediate_size * chunk
    share = VARIED_SLACK_SHARE if work.varied_rows else SLACK_SHARE
    again = Counter(level.repeats for level in sorted(levels))
    kept = ", ".join(f"{words} in {count} blocks" for words, count in again.items())
    return (
        MemoryPart(
            name="kept activations",
            bytes=kept_bytes,
            formula=f"{tokens:,} tokens; computed again: {kept}"
            + ("; the rest waits in host memory" if memory.offload_activations else ""),
        ),
        MemoryPart(
            name="working memory",
            bytes=row - kept_bytes,
            formula="largest of one block's MLP and attention, and a loss chunk",
        ),
        MemoryPart(
            name="kept of smaller rows",
            bytes=rest,
            formula="shorter rows keep more, up to the same sum",
        ),
        MemoryPart(
            name="allocator slack",
            bytes=beside + int(share * passing),
            formula=f"{size_text(beside)} with cuBLAS's workspaces"
            + (" and one more gate and up" if memory.offloaded_mlp_blocks else "")
            + f", and {share:.0%} of the most that comes and goes",
        ),
    )
