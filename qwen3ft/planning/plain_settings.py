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
from qwen3ft.records.plan import MemorySettings
from qwen3ft.units import gb

LARGEST_LOSS_CHUNK_TOKENS = 4096

KEEP_ALL_SHARE = 0.85
"""Share of the budget that a plan without recomputation may take; the rest is a reserve."""

CPU_EVAL_BATCH_SIZE = 32

PLAIN_REASONS = dict.fromkeys(
    (
        "offload_attention",
        "offloaded_mlp_blocks",
        "activation_bytes",
        "chunk_tokens",
        "head_groups",
    ),
    "A setting of the fused path alone.",
)
"""Reasons for the levers that the plain path leaves as they are."""


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


def offload_optimizer_reason(memory: MemorySettings) -> str:
    """Return why the optimizer's moments are where they are."""
    if memory.offload_optimizer:
        return "Nothing else fits; gradients go to the host and parameters back at each step."
    return "Not needed: the GPU updates faster."


def plain_reasons(
    config: TrainingConfig, work: Workload, peak_bytes: int, budget_gb: float
) -> dict[str, str]:
    """Return why each derived setting has its value."""
    memory = work.memory
    logits_tokens = min(memory.loss_chunk_tokens, work.tokens)
    fits = f"the predicted peak is {gb(peak_bytes):.2f} of {budget_gb:.2f} GB"
    accumulation = config.effective_batch_size // memory.micro_batch_size
    if memory.micro_batch_size == config.batch_size:
        micro = f"As configured; {fits}."
    else:
        micro = f"The largest divisor of {config.effective_batch_size} that fits; {fits}."
    if config.gradient_checkpointing != "auto":
        recompute = f"Configured as '{config.gradient_checkpointing}'."
    elif memory.gradient_checkpointing:
        recompute = f"Keeping all activations would take more than {KEEP_ALL_SHARE:.0%} of budget."
    else:
        recompute = f"All activations fit {KEEP_ALL_SHARE:.0%} of the budget, and that is faster."
    if config.packing != "auto":
        packing = f"Configured as '{config.packing}'."
    elif memory.packing:
        packing = (
            f"Up to {work.capacity_tokens} tokens a micro-batch, as {memory.micro_batch_size} "
            "padded rows would hold; on a GPU each micro-batch costs, and padding is computed for "
            "nothing."
        )
    elif work.device == "cuda":
        packing = "The attention mask of packed rows does not fit; padded rows do."
    else:
        packing = "On a CPU it was measured no faster: attention is as wide as the packed row."
    offload = "Nothing else fits." if memory.offload_activations else "Not needed: it is slow."
    return PLAIN_REASONS | {
        "micro_batch_size": micro,
        "gradient_accumulation_steps": f"{memory.micro_batch_size} x {accumulation} keeps the "
        f"{config.effective_batch_size} sequences per step that were asked for.",
        "eval_batch_size": f"{memory.eval_batch_size} held-out rows of up to {work.eval_tokens} "
        "tokens fit where training does, as nothing is kept for gradients.",
        "gradient_checkpointing": recompute,
        "loss_chunk_tokens": f"Logits of {logits_tokens} tokens at most "
        "exist at one time; larger chunks are faster, smaller ones leaner.",
        "offload_activations": offload,
        "offload_optimizer": offload_optimizer_reason(memory),
        "packing": packing,
        "predicted": f"For rows of {work.sequence_tokens} tokens, the longest there are.",
    }
