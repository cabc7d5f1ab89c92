"""Candidates of the plain path (transformers and PEFT), from fast to frugal."""

from __future__ import annotations

import itertools
from collections.abc import Iterator

from qwen3ft.config import TrainingConfig
from qwen3ft.planning.footprint import predict_memory, total_bytes
from qwen3ft.planning.packing import divisors
from qwen3ft.planning.workload import (
    SMALLEST_LOSS_CHUNK_TOKENS,
    SMALLEST_PLANNED_LOSS_CHUNK_TOKENS,
    Workload,
)

LARGEST_LOSS_CHUNK_TOKENS = 4096

KEEP_ALL_SHARE = 0.85
"""Share of the budget that a plan without recomputation may take; the rest is a reserve."""

CPU_EVAL_BATCH_SIZE = 32


def plain_candidates(config: TrainingConfig, first: Workload) -> Iterator[tuple[Workload, float]]:
    """Yield workloads from fast to frugal, each with the share of the budget it may take."""
    modes = {"auto": (False, True), "on": (True,), "off": (False,)}[config.gradient_checkpointing]
    packed = first.memory.packing
    packings = (True, False) if packed and config.packing == "auto" else (packed,)
    for micro_batch_size in divisors(config.effective_batch_size):
        if micro_batch_size > config.batch_size:
            continue
        # Recomputation comes before a smaller micro-batch: it costs about a third more compute,
        # while half the micro-batch pays for all dequantisation and every launch twice. Padded
        # rows come before it too: it may be the wide mask of a packed row that does not fit.
        for packing, recompute in itertools.product(packings, modes):
            chunk_tokens = LARGEST_LOSS_CHUNK_TOKENS
            while chunk_tokens >= SMALLEST_PLANNED_LOSS_CHUNK_TOKENS:
                work = first.with_memory(
                    micro_batch_size=micro_batch_size,
                    packing=packing,
                    gradient_checkpointing=recompute,
                    loss_chunk_tokens=chunk_tokens,
                )
                yield work, (1.0 if recompute or len(modes) == 1 else KEEP_ALL_SHARE)
                chunk_tokens //= 2
    # Padded if that is allowed: a packed row needs a mask of its length squared.
    yield most_frugal(first.with_memory(packing=packings[-1])), 1.0


def most_frugal(first: Workload) -> Workload:
    """Return the settings that take least: one row at a time, and every lever pulled."""
    return first.with_memory(
        loss_chunk_tokens=SMALLEST_LOSS_CHUNK_TOKENS,
        offload_activations=first.device == "cuda" and first.memory.gradient_checkpointing,
        offload_optimizer=first.device == "cuda",
    )


def with_evaluation(work: Workload, limit_bytes: int) -> Workload:
    """Return `work` with the largest evaluation batch worth having.

    On a GPU it may not raise the peak, and has at most twice the micro-batch; on a CPU it has to
    fit, and has up to 32 rows.
    """
    wanted = 2 * work.memory.micro_batch_size
    if work.device == "cpu":
        # Small batches waste most of a CPU's time.
        wanted = max(wanted, CPU_EVAL_BATCH_SIZE)
    else:
        limit_bytes = total_bytes(predict_memory(work))
    while wanted > 1:
        larger = work.with_memory(eval_batch_size=wanted)
        if total_bytes(predict_memory(larger)) <= limit_bytes:
            return larger
        wanted //= 2
    return work
