"""The predicted peak of the fused path by part, from what `fused_footprint` counts.

Guarantees: pure arithmetic, no torch. Beside rows and what comes and goes with them there is what
the allocator cannot use: little where rows have one length, more where they differ, and more again
where gate and up of some blocks leave for host memory between what stays.
"""

from __future__ import annotations

from collections import Counter

from qwen3ft.planning.fused_footprint import FusedSizes
from qwen3ft.planning.recompute import Level
from qwen3ft.records.plan import GIB, MemoryPart

WORKSPACE_BYTES = 2**26
"""What cuBLAS holds for the threads of forward and backward on Hopper; less on older cards."""

LEAN_WORKSPACE_BYTES = 2**24
"""The same where `qwen3ft.machine.memory` asks it for as little as on those."""

SLACK_BYTES = int(0.08 * GIB)
"""What the allocator holds at least beyond what is in use."""

SLACK_SHARE, VARIED_SLACK_SHARE = 0.08, 0.2
"""The same as a share of what comes and goes: for rows of one length, and for rows of different
ones, each of which fits less well into the place of the last."""


def fixed_parts(sizes: FusedSizes, trained: int, tokens: int) -> tuple[MemoryPart, ...]:
    """The parts that no budget changes which differ from the plain path's.

    Args:
        sizes: The settings of the step.
        trained: Parameters of the adapter.
        tokens: Of the largest row.
    """
    # The gradients of a micro-batch come as what blocks keep goes.
    going = 0 if sizes.offload else sizes.kept_bytes(tokens, sizes.frugal_levels)
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


def row_parts(
    sizes: FusedSizes, tokens: int, budget_bytes: int, *, varied: bool = True, lean: bool = False
) -> tuple[MemoryPart, ...]:
    """The parts of the largest row, and what lies beside it.

    Args:
        sizes: The settings of the step.
        tokens: Of the largest row.
        budget_bytes: What any row may take.
        varied: Whether rows differ in length.
        lean: Whether cuBLAS has to do with little.
    """
    blocks = sizes.shape.num_hidden_layers
    levels = sizes.levels(tokens, budget_bytes)
    row, kept_bytes = sizes.row_bytes(tokens, levels), sizes.kept_bytes(tokens, levels)
    most = sizes.row_bytes(tokens, (Level.KEEP_ALL,) * blocks)
    rest = 0 if sizes.offload else max(0, min(budget_bytes, most) - row)
    # Of the most frugal levels for any budget, so that the sum follows the budget.
    frugal = sizes.frugal_levels
    passing = sizes.row_bytes(tokens, frugal) - sizes.kept_bytes(tokens, frugal)
    beside = SLACK_BYTES + (LEAN_WORKSPACE_BYTES if lean else WORKSPACE_BYTES)
    if sizes.offloaded_mlp_blocks:  # gate and up come and go between what stays
        chunk = min(tokens, sizes.chunk_tokens)
        beside += 2 * sizes.compute_bytes * sizes.shape.intermediate_size * chunk
    share = VARIED_SLACK_SHARE if varied else SLACK_SHARE
    again = Counter(level.repeats for level in sorted(levels))
    kept = ", ".join(f"{words} in {count} blocks" for words, count in again.items())
    return (
        MemoryPart(
            name="kept activations",
            bytes=kept_bytes,
            formula=f"{tokens:,} tokens; computed again: {kept}"
            + ("; the rest waits in host memory" if sizes.offload else ""),
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
            formula=f"{beside / GIB:.2f} GB with cuBLAS's workspaces"
            + (" and one more gate and up" if sizes.offloaded_mlp_blocks else "")
            + f", and {share:.0%} of the most that comes and goes",
        ),
    )
