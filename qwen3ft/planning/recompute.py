"""Levels of recomputation: what a block of the fused path keeps for its backward, in bytes.

Each level keeps less than the one before and computes again what it drops. Bytes per token of one
block (c: bytes of the compute type; H, I: hidden and MLP size; Q, K: features of all query /
key-value heads; h: query heads; r: ranks, padded to 8):

    always             c H + 2 c r      the block's input; two products with A
    RECOMPUTE_ALL      -                attention runs again
    RECOMPUTE_O        + c Q + 4 h      its output and log-sum-exp are kept; o's product runs again
    RECOMPUTE_QKV      + c H            the input of the MLP is; the product of q, k, v runs again
    RECOMPUTE_GATE_UP  + c (Q + 2 K)    q, k and v are; the product of gate and up runs again
    OFFLOAD_GATE_UP    the same         gate and up wait in host memory; no product runs again
    KEEP_ALL           + 2 c I          gate and up stay on the device

`tests/training/test_fused_step.py` holds this against what a step really keeps.
"""

from __future__ import annotations

from enum import IntEnum

from qwen3ft.records.model import ModelShape

RANK_MULTIPLE = 8  # in bf16 16 bytes, the alignment of rows that tensor cores want


class Level(IntEnum):
    """Amount of recomputation in a block's backward; each level includes those before it."""

    KEEP_ALL = 0
    OFFLOAD_GATE_UP = 1
    RECOMPUTE_GATE_UP = 2
    RECOMPUTE_QKV = 3
    RECOMPUTE_O = 4
    RECOMPUTE_ALL = 5

    @property
    def recomputed(self) -> str:
        """Names of what the backward computes again."""
        words = {
            Level.RECOMPUTE_GATE_UP: "gate and up",
            Level.RECOMPUTE_QKV: "gate, up, q, k and v",
            Level.RECOMPUTE_O: "all but attention",
            Level.RECOMPUTE_ALL: "everything",
        }
        return words.get(self, "nothing")


ON_DEVICE = tuple(level for level in Level if level != Level.OFFLOAD_GATE_UP)
"""Levels that need no host memory, finest first."""


def padded_rank(ranks: int) -> int:
    """Return the columns that adapters with `ranks` rows in all take."""
    return -(-ranks // RANK_MULTIPLE) * RANK_MULTIPLE


def kept_bytes_per_token(shape: ModelShape, rank: int, compute_bytes: int, level: Level) -> int:
    """Return the bytes that one block keeps per token at `level` (see the module docstring)."""
    c, hidden = compute_bytes, shape.hidden_size
    query, key = shape.query_features, shape.key_features
    kept = c * hidden + 2 * c * padded_rank(rank)
    if level < Level.RECOMPUTE_ALL:
        kept += c * query + 4 * shape.num_attention_heads
    if level < Level.RECOMPUTE_O:
        kept += c * hidden
    if level < Level.RECOMPUTE_QKV:
        kept += c * (query + 2 * key)
    if level == Level.KEEP_ALL:
        kept += 2 * c * shape.intermediate_size
    return kept


def offload_evenly(levels: tuple[Level, ...], count: int) -> tuple[Level, ...]:
    """Return `levels` with gate and up of `count` blocks in host memory instead of dropped."""
    # Evenly spread: a block's tensors have as long to leave the device as the blocks up to the
    # next offloaded one take.
    dropped = [index for index, level in enumerate(levels) if level == Level.RECOMPUTE_GATE_UP]
    count = min(count, len(dropped))
    chosen = {dropped[(2 * number + 1) * len(dropped) // (2 * count)] for number in range(count)}
    return tuple(
        Level.OFFLOAD_GATE_UP if index in chosen else level for index, level in enumerate(levels)
    )
