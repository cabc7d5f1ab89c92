"""Bytes and operations of a fused step over packed rows, and which levels of recomputation fit.

Counts the tensors of `qwen3ft.training.fused.block` as they live and die there. c: bytes of the
compute type; T: tokens of the packed row; W: tokens of a chunk of it; H, I, Q, K: hidden and MLP
size, features of all query / key-value heads; h: query heads; V: vocabulary; g: head groups;
r: padded ranks; s: sequences. Beside what blocks keep (`qwen3ft.planning.recompute`), and
4 T head_dim for cos and sin:

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
                         gradient, made dense); 512 s (Q + h) / g more of that sum and of one number
                         a head, since it pads each of s sequences by up to 128 tokens

What a level drops takes room again where it is recomputed: q, k, v and the output of attention in
both passes of attention, all of them in an MLP's backward; its input, gate and up (2 c W I) in the
MLP's own passes.

Held against peaks by part measured on an H100, 0.6B to 14B, 2,048 to 32,768 tokens
(`benchmarks/memory`): apart from the workspaces of cuBLAS, within 0.02 GB.
"""

from __future__ import annotations

from bisect import bisect_right
from functools import lru_cache

from qwen3ft.planning.packing import row_bounds, row_tokens
from qwen3ft.planning.recompute import (
    ON_DEVICE,
    Level,
    kept_bytes_per_token,
    offload_evenly,
    padded_rank,
)
from qwen3ft.planning.workload import Workload
from qwen3ft.records.model import ModelShape

MOST_GRAPHS = 32
"""Most sizes of rows whose CUDA graphs exist at one time."""

GRAPH_BYTES_PER_BLOCK = 100 * 1024
"""Memory that the driver takes for the two graphs of a size: 3.4 MiB for 36 blocks."""


class FusedSizes:
    """Sizes of a fused step with the settings of `work`; lengths of rows are given to each.

    Args:
        work: The settings.
        row_sequences: Sequences of a row, padding included; those that `work` expects if None.
    """

    def __init__(self, work: Workload, row_sequences: int | None = None) -> None:
        self.work, self.shape, self.memory = work, work.shape, work.memory
        self.row_sequences = row_sequences or work.row_sequences
        self.rank, self.compute_bytes = work.adapter.r, work.compute_bytes
        self._query, self._key = work.shape.query_features, work.shape.key_features

    @property
    def weight_bytes(self) -> int:
        """Bytes of an MLP's dequantised matrices, with the adapters beside them."""
        shape, low = self.shape, padded_rank(2 * self.rank)
        return self.compute_bytes * 3 * shape.intermediate_size * (shape.hidden_size + low)

    @property
    def adapter_bytes(self) -> int:
        """Bytes of all blocks' adapters in the compute type, with the zeros that pad them."""
        shape = self.shape
        three, two, one = (padded_rank(n * self.rank) for n in (3, 2, 1))
        wide = three * (shape.hidden_size + self._query + 2 * self._key)
        wide += two * (shape.hidden_size + 2 * shape.intermediate_size)
        narrow = one * (2 * shape.hidden_size + self._query + shape.intermediate_size)
        return self.compute_bytes * shape.num_hidden_layers * (wide + narrow)

    @property
    def frugal_levels(self) -> tuple[Level, ...]:
        """Level of each block that keeps least."""
        level = Level.RECOMPUTE_O if self.memory.offload_attention else Level.RECOMPUTE_ALL
        return (level,) * self.shape.num_hidden_layers

    def kept_per_token(self) -> tuple[int, ...]:
        """Return the bytes that one block keeps per token at each level."""
        return _kept_per_token(self.shape, self.rank, self.compute_bytes)

    # --- one pass of one block: the peak of what comes and goes, in bytes ---
    # The dequantised matrices of the MLP are a part of the prediction of their own. They are gone
    # in every other pass, so their bytes are subtracted there.

    def forward_bytes(self, tokens: int, level: Level) -> int:
        """Return the peak of a block's forward over a row of `tokens` at `level`."""
        c, hidden, groups = self.compute_bytes, self.shape.hidden_size, self.memory.head_groups
        attention = hidden + (self._query + self._key) // groups
        attention += self._query * ((level == Level.RECOMPUTE_ALL) + (groups > 1))
        attention += self._query + 2 * self._key if level >= Level.RECOMPUTE_QKV else 0
        mlp = 2 * hidden if level >= Level.RECOMPUTE_O else hidden
        return max(
            c * tokens * attention + self._log_sum_exp_bytes(tokens) - self.weight_bytes,
            c * tokens * mlp + self._wide_bytes(tokens, level),
        )

    def loss_bytes(self, tokens: int, *, with_gradient: bool = True) -> int:
        """Return the peak of the loss of a row."""
        c, hidden = self.compute_bytes, self.shape.hidden_size
        stream = 2 * hidden + padded_rank(self.rank) if with_gradient else hidden
        targets = min(self.memory.loss_chunk_tokens, tokens)
        chunk = targets * (self.shape.vocab_size + 3 * hidden)
        return c * (tokens * stream + chunk) - self.weight_bytes

    def backward_bytes(self, tokens: int, level: Level) -> int:
        """Return the peak of a block's backward, less what the block has freed by then."""
        c, hidden, groups = self.compute_bytes, self.shape.hidden_size, self.memory.head_groups
        query, key, low = self._query, self._key, padded_rank(self.rank)
        again = query if level == Level.RECOMPUTE_ALL else 0
        of_mlp = again + (query + 2 * key if level == Level.RECOMPUTE_ALL else 0)
        of_mlp += hidden if level >= Level.RECOMPUTE_O else 0
        chunk = min(tokens, self.memory.chunk_tokens) * (hidden + padded_rank(2 * self.rank))
        mlp = c * (tokens * (hidden + low + of_mlp) + chunk) + self._wide_bytes(tokens, level)
        of_attention = again + (query + 2 * key if level >= Level.RECOMPUTE_QKV else 0)
        # A block's backward frees what its MLP kept before it comes to attention.
        of_attention -= hidden if level < Level.RECOMPUTE_O else 0
        of_attention -= 2 * self.shape.intermediate_size if level == Level.KEEP_ALL else 0
        per_group = (8 if groups > 1 else 6) * query + 3 * key
        of_attention += hidden + low + query + per_group // groups
        attention = c * tokens * of_attention + self._log_sum_exp_bytes(tokens) - self.weight_bytes
        return max(mlp, attention + self._padded_dq_bytes // groups)

    @property
    def _padded_dq_bytes(self) -> int:
        """Bytes of fp32 in FlashAttention's backward for tokens that no sequence has."""
        # (tokens + 128 x sequences, heads x head_dim) and (heads, the same); the source is
        # `mha_varlen_bwd` in torch's flash_api.cpp.
        bounds = row_bounds(self.row_sequences, graphs=self.memory.graphs)
        return 4 * 128 * (bounds - 1) * (self._query + self.shape.num_attention_heads)

    def _wide_bytes(self, tokens: int, level: Level) -> int:
        """Return the bytes of the MLP's wide tensors of a chunk: activated, and gate and up."""
        wide = 1 if level == Level.KEEP_ALL else 3
        chunk = min(tokens, self.memory.chunk_tokens)
        return self.compute_bytes * chunk * wide * self.shape.intermediate_size

    def _log_sum_exp_bytes(self, tokens: int) -> int:
        """Return the bytes of one fp32 number per query and head: log-sum-exp, or its gradient."""
        return 4 * self.shape.num_attention_heads * tokens

    def _rotary_bytes(self, tokens: int) -> int:
        """Return the bytes of a row's cos and sin."""
        return 4 * tokens * self.shape.head_dim

    # --- whole rows ---

    def evaluation_bytes(self, tokens: int) -> int:
        """Return the peak of evaluating a row, for which blocks keep nothing."""
        block = self.compute_bytes * tokens * self.shape.hidden_size
        block += self.forward_bytes(tokens, Level.RECOMPUTE_ALL)
        return self._rotary_bytes(tokens) + max(block, self.loss_bytes(tokens, with_gradient=False))

    def beside_graphs_bytes(self, tokens: int) -> int:
        """Return the bytes beside CUDA graphs, which hold the memory of rows of up to `tokens`.

        That is what passes into and out of them, and the largest of what runs without: the loss, an
        evaluation, the block that is tried before a recording, and the gradients of a micro-batch
        on their way to those of the step.
        """
        c, shape = self.compute_bytes, self.shape
        hidden, low = shape.hidden_size, padded_rank(self.rank)
        gradients = 4 * self.work.adapter.trainable_parameters
        passing = c * tokens * (4 * hidden + low) + self._rotary_bytes(tokens) + gradients
        targets = min(self.memory.loss_chunk_tokens, tokens)
        loss = c * targets * (shape.vocab_size + 3 * hidden)
        # The search gives an evaluation as many rows as a row of training holds, at its end.
        held_out = row_tokens(self.memory.eval_batch_size * self.work.eval_tokens, graphs=True)
        evaluation = self.evaluation_bytes(max(tokens, held_out)) + self.weight_bytes
        tried = c * tokens * (2 * hidden + low) + self.weight_bytes
        tried += tokens * self.kept_per_token()[Level.RECOMPUTE_ALL]
        tried += self.backward_bytes(tokens, Level.RECOMPUTE_ALL)
        graphs = MOST_GRAPHS * GRAPH_BYTES_PER_BLOCK * shape.num_hidden_layers
        return passing + max(loss, evaluation, tried, gradients) + graphs

    def row_bytes(self, tokens: int, levels: tuple[Level, ...]) -> int:
        """Return the peak of training a row: what its blocks keep, and what comes and goes.

        Args:
            tokens: Tokens of the row.
            levels: Level of each block.
        """
        kept = self.kept_bytes(tokens, levels)
        peaks = [kept + self.forward_bytes(tokens, max(levels))]
        peaks += [] if self.memory.graphs else [kept + self.loss_bytes(tokens)]
        per_token = self.kept_per_token()
        freed, before = 0, len(levels)
        # The backward begins at the last block and frees each before it comes to the next, so the
        # peak at a level is at the last block that has it.
        for level in dict.fromkeys(reversed(levels)):
            last = len(levels) - levels[::-1].index(level)
            if not self.memory.offload_activations:
                freed += tokens * sum(per_token[each] for each in levels[last:before])
                before = last
            peaks.append(kept - freed + self.backward_bytes(tokens, level))
        return self._rotary_bytes(tokens) + max(peaks)

    def kept_bytes(self, tokens: int, levels: tuple[Level, ...]) -> int:
        """Return the bytes that all blocks keep of a row on the device, once all have run."""
        per_token = self.kept_per_token()
        if self.memory.offload_activations:
            # One block's tensors on their way out or in, beside those in use. The narrow ones,
            # products with A, stay on the device.
            kept = 2 * tokens * per_token[max(levels)]
            low = 2 * self.compute_bytes * padded_rank(self.rank)
            return kept + (len(levels) - 2) * tokens * low
        kept = tokens * sum(levels.count(level) * per_token[level] for level in set(levels))
        return kept + (self._in_transit_bytes(tokens) if Level.OFFLOAD_GATE_UP in levels else 0)

    def offloaded_bytes(self, tokens: int, levels: tuple[Level, ...]) -> int:
        """Return the bytes of host memory that a row takes where its activations are offloaded."""
        per_token = self.kept_per_token()
        return tokens * sum(levels.count(level) * per_token[level] for level in set(levels))

    def levels(self, tokens: int, budget_bytes: int) -> tuple[Level, ...]:
        """Return the level of each block that keeps most of a row within `budget_bytes`.

        If nothing fits, the most frugal levels.
        """
        if self.memory.offload_activations:
            return self.frugal_levels
        levels = self._filled(tokens, budget_bytes)
        if not self.memory.offloaded_mlp_blocks or Level.RECOMPUTE_GATE_UP not in levels:
            return levels
        less = self._filled(tokens, budget_bytes - self._in_transit_bytes(tokens))
        sent = offload_evenly(less, self.memory.offloaded_mlp_blocks)
        if self.row_bytes(tokens, sent) > budget_bytes:
            return levels
        # Tensors in transit take room that other blocks would use; that must be worth it.
        return min(levels, sent, key=lambda each: self.operations(tokens, each, 0))

    def _filled(self, tokens: int, budget_bytes: int) -> tuple[Level, ...]:
        """Return the finest level that fits for all blocks, and for as many the next finer one."""
        # Each level frees its bytes at about the same cost, so no mix of more than two is faster.
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

    def _in_transit_bytes(self, tokens: int) -> int:
        """Return the bytes of gate and up that come back while another block uses its own."""
        # Those in use are part of the MLP's own count only where it runs in one chunk.
        gate_up = 2 * self.compute_bytes * self.shape.intermediate_size * tokens
        return gate_up if tokens <= self.memory.chunk_tokens else 2 * gate_up

    def operations(self, tokens: int, levels: tuple[Level, ...], sequence_tokens: int) -> float:
        """Return the floating-point operations of a row's forward, backward and recomputation.

        Args:
            tokens: Tokens of the row.
            levels: Level of each block.
            sequence_tokens: Length of a typical sequence, which attention's cost depends on.
        """
        # 2 operations a multiplication. The frozen weights have no gradient, so a linear layer's
        # backward costs as much as its forward.
        shape = self.shape
        attention = 2 * self._query * sequence_tokens  # causal: half of two products
        again = {
            Level.RECOMPUTE_GATE_UP: 4 * shape.hidden_size * shape.intermediate_size,
            Level.RECOMPUTE_QKV: 2 * shape.hidden_size * (self._query + 2 * self._key),
            Level.RECOMPUTE_O: 2 * shape.hidden_size * self._query,
            Level.RECOMPUTE_ALL: attention,
        }
        linear = 2 * linear_parameters(shape) // shape.num_hidden_layers
        # FlashAttention's backward has five products where its forward has two: 1 + 2.5.
        blocks = len(levels) * (2 * linear + 3.5 * attention)
        for level in set(levels):
            repeated = sum(cost for at, cost in again.items() if level >= at)
            blocks += levels.count(level) * repeated
        return tokens * (blocks + 4 * shape.vocab_size * shape.hidden_size)


@lru_cache(maxsize=64)
def linear_parameters(shape: ModelShape) -> int:
    """Return `shape.linear_parameters`, cached: a search asks for it thousands of times."""
    return shape.linear_parameters


@lru_cache(maxsize=64)
def _kept_per_token(shape: ModelShape, rank: int, compute_bytes: int) -> tuple[int, ...]:
    return tuple(kept_bytes_per_token(shape, rank, compute_bytes, level) for level in Level)
