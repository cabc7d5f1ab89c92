"""Parts of the predicted memory of a fused step: what lies beside the rows, and the largest row.

What a row takes is counted by `qwen3ft.planning.fused_sizes`.
"""

from __future__ import annotations

from collections import Counter

from qwen3ft.planning.fused_sizes import FusedSizes
from qwen3ft.planning.recompute import Level
from qwen3ft.records.plan import MemoryPart
from qwen3ft.units import GIB, MIB, size_text

WORKSPACE_BYTES = 96 * MIB
"""Workspaces of cuBLAS for the threads of forward and backward: 64 MiB on an H100, and up to 32
more on an H200; less on older GPUs."""

LEAN_WORKSPACE_BYTES = 16 * MIB
"""Workspaces of cuBLAS where `qwen3ft.machine.memory` limits them, as it does for lean plans."""

SLACK_BYTES = int(0.08 * GIB)
"""Least that the allocator holds beyond what is in use."""

SLACK_SHARE, VARIED_SLACK_SHARE = 0.08, 0.2
"""Share of what comes and goes that the allocator holds beyond it: for rows of one length, and for
rows of different lengths, each of which fits less well into the place of the last."""


def fixed_parts(sizes: FusedSizes) -> tuple[MemoryPart, ...]:
    """Return the parts that no budget changes and that differ from the plain path's."""
    work, trained = sizes.work, sizes.work.adapter.trainable_parameters
    # The gradients of a micro-batch grow as what blocks keep is freed, so only those count that
    # are larger than the least a row keeps.
    offload = work.memory.offload_activations
    freed = 0 if offload else sizes.kept_bytes(work.tokens, sizes.frugal_levels)
    own = max(0, 4 * trained - freed)
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
    """Return the parts of the largest row, and the allocator's slack."""
    work, memory = sizes.work, sizes.memory
    tokens, budget_bytes = work.tokens, memory.activation_bytes
    levels = sizes.levels(tokens, budget_bytes)
    row, kept_bytes = sizes.row_bytes(tokens, levels), sizes.kept_bytes(tokens, levels)
    most = sizes.row_bytes(tokens, (Level.KEEP_ALL,) * work.shape.num_hidden_layers)
    rest = 0 if memory.offload_activations else max(0, min(budget_bytes, most) - row)
    # Slack is that of the most frugal levels for any budget: so the total grows with the budget
    # alone, and the search can solve for the budget that fits.
    frugal = sizes.frugal_levels
    passing = sizes.row_bytes(tokens, frugal) - sizes.kept_bytes(tokens, frugal)
    beside = SLACK_BYTES + (LEAN_WORKSPACE_BYTES if memory.offload_optimizer else WORKSPACE_BYTES)
    if memory.offloaded_mlp_blocks:
        # Gate and up come and go between tensors that stay, which leaves gaps of their size.
        chunk = min(tokens, memory.chunk_tokens)
        beside += 2 * work.compute_bytes * work.shape.intermediate_size * chunk
    graphs = sizes.beside_graphs_bytes(tokens) if memory.graphs else 0
    beside_graphs = MemoryPart(
        name="beside CUDA graphs",
        bytes=graphs,
        formula="what runs without them while they hold the memory of rows: the largest of a loss "
        "chunk, an evaluation, one block and the gradients; and what passes in and out",
    )
    share = VARIED_SLACK_SHARE if work.varied_rows else SLACK_SHARE
    blocks = Counter(level.recomputed for level in sorted(levels))
    recomputed = ", ".join(f"{words} in {count} blocks" for words, count in blocks.items())
    return (
        MemoryPart(
            name="kept activations",
            bytes=kept_bytes,
            formula=f"{tokens:,} tokens; computed again: {recomputed}"
            + ("; the rest waits in host memory" if memory.offload_activations else ""),
        ),
        MemoryPart(
            name="working memory",
            bytes=row - kept_bytes,
            formula="largest of one block's MLP and attention"
            + ("" if memory.graphs else ", and a loss chunk"),
        ),
        MemoryPart(
            name="kept of smaller rows",
            bytes=rest,
            formula="shorter rows keep more, up to the same sum",
        ),
        *([beside_graphs] if memory.graphs else []),
        MemoryPart(
            name="allocator slack",
            bytes=beside + int(share * passing),
            formula=f"{size_text(beside)} with cuBLAS's workspaces"
            + (" and one more gate and up" if memory.offloaded_mlp_blocks else "")
            + f", and {share:.0%} of the most that comes and goes",
        ),
    )
