"""Say why each derived setting of a plan has its value: one sentence each, on both paths."""

from __future__ import annotations

from qwen3ft.config import TrainingConfig
from qwen3ft.planning.plain_settings import KEEP_ALL_SHARE
from qwen3ft.planning.workload import Workload
from qwen3ft.units import gb

FUSED_LEVERS = (
    *("offload_attention", "offloaded_mlp_blocks", "activation_bytes"),
    *("chunk_tokens", "head_groups", "graphs"),
)
"""Levers that the plain path leaves as they are."""


def fused_reasons(
    effective_batch_size: int, work: Workload, peak_bytes: int, budget_gb: float
) -> dict[str, str]:
    """Return why each derived setting of the fused path has its value."""
    memory, room_gb = work.memory, gb(work.memory.activation_bytes)
    return _shared(effective_batch_size, work) | {
        "micro_batch_size": f"Packed rows of up to {work.capacity_tokens} tokens, estimated to be "
        f"the fastest split; the predicted peak is {gb(peak_bytes):.2f} of {budget_gb:.2f} GB.",
        "eval_batch_size": "As many held-out rows as a packed row of training holds.",
        "gradient_checkpointing": f"A row may take {room_gb:.2f} GB: what of its blocks does not "
        "fit that is computed again, cheapest parts first."
        if memory.gradient_checkpointing
        else f"All activations of the largest row fit: {room_gb:.2f} GB.",
        "offload_activations": "Nothing faster fits."
        if memory.offload_activations
        else "Not needed.",
        "offload_attention": "Its transfer was estimated to be faster than computing it again."
        if memory.offload_attention
        else "Nothing that waits in host memory includes it.",
        "offloaded_mlp_blocks": "The forward has the time to send gate and up of "
        f"{memory.offloaded_mlp_blocks} blocks to the host, where they would be computed again."
        if memory.offloaded_mlp_blocks
        else "Not used.",
        "activation_bytes": "The largest row with as much kept as is of use or the budget leaves.",
        "packing": "The fused path runs packed rows alone.",
        "chunk_tokens": f"The MLP of {min(memory.chunk_tokens, work.tokens)} tokens at one time.",
        "graphs": "Launching the kernels of a row one by one would take longer than computing it."
        if memory.graphs
        else "Rows take longer than their launches, what lies beside graphs would not fit or leave "
        "too little for rows, or the plan is for a CPU or offloads.",
        "head_groups": f"The gradient of attention in {memory.head_groups} part(s) of the heads.",
    }


def plain_reasons(
    config: TrainingConfig, work: Workload, peak_bytes: int, budget_gb: float
) -> dict[str, str]:
    """Return why each derived setting of the plain path has its value."""
    memory = work.memory
    fits = f"the predicted peak is {gb(peak_bytes):.2f} of {budget_gb:.2f} GB"
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
    unused = dict.fromkeys(FUSED_LEVERS, "A setting of the fused path alone.")
    shared = unused | _shared(config.effective_batch_size, work)
    return shared | {
        "micro_batch_size": micro,
        "eval_batch_size": f"{memory.eval_batch_size} held-out rows of up to {work.eval_tokens} "
        "tokens fit where training does, as nothing is kept for gradients.",
        "gradient_checkpointing": recompute,
        "offload_activations": offload,
        "packing": packing,
    }


def _shared(effective_batch_size: int, work: Workload) -> dict[str, str]:
    """Return the reasons that both paths give."""
    memory = work.memory
    accumulation = effective_batch_size // memory.micro_batch_size
    return {
        "gradient_accumulation_steps": f"{memory.micro_batch_size} x {accumulation} keeps the "
        f"{effective_batch_size} sequences per step that were asked for.",
        "loss_chunk_tokens": f"Logits of {min(memory.loss_chunk_tokens, work.tokens)} tokens at "
        "most exist at one time; larger chunks are faster, smaller ones leaner.",
        "offload_optimizer": "Nothing else fits; gradients go to the host and parameters back at "
        "each step."
        if memory.offload_optimizer
        else "Not needed: the GPU updates faster.",
        "places": "The whole step on one device; more share it with the setting gpus."
        if work.ranks == 1
        else f"{work.ranks} ranks share each step, with a budget each; the result is that of one.",
        "predicted": f"For rows of {work.sequence_tokens} tokens, the longest there are.",
    }
