"""The memory ladder: levers against running out of memory, those that keep the result first.

plain: smaller micro-batch with more accumulation - recomputation - smaller loss chunks -
activations in host memory (GPU only)
fused: keep less of each row - no CUDA graphs - smaller micro-batch - smaller loss chunks - a
block's work in smaller parts - activations in host memory
both: the optimizer's moments in host memory (GPU only)
either, with consent: half the row length - half the rank

The effective batch is the same on every rung, and the ladder ends.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from qwen3ft.model.shapes import count_adapter_parameters
from qwen3ft.planning.fused_sizes import FusedSizes
from qwen3ft.planning.packing import divisors
from qwen3ft.planning.plan import repredict
from qwen3ft.planning.workload import SMALLEST_LOSS_CHUNK_TOKENS, workload_of
from qwen3ft.records.plan import TrainPlan
from qwen3ft.units import GIB, size_text

KEPT_SHARE = 0.75
"""Share of the room for a row's activations that a rung leaves."""

SMALLEST_MLP_CHUNK_TOKENS = 1024
SMALLEST_SEQUENCE_TOKENS = 64
SMALLEST_RANK = 2
EVALUATION_PHASE = "evaluate"


@dataclass(frozen=True)
class Rung:
    """One step down the ladder."""

    values: dict[str, Any]
    """New values of settings and memory levers, for `TrainPlan.with_settings`."""
    what: str
    """Description for people."""
    keeps_result: bool = True
    """True if training ends with the same adapter, but for rounding."""


def next_rungs(plan: TrainPlan, phase: str, *, allow_degraded: bool) -> list[Rung]:
    """Return every rung below `plan`, each applied on top of those before it; empty at the end.

    Args:
        plan: The attempt that ran out of memory.
        phase: The phase it did so in. In an evaluation its batch shrinks first, as far as it can.
        allow_degraded: Whether rungs that change the result are included.
    """
    return list(_descend(plan, phase, allow_degraded=allow_degraded))


def _descend(plan: TrainPlan, phase: str, *, allow_degraded: bool) -> Iterator[Rung]:
    # From cheap to expensive: recomputing costs less than another micro-batch, which pays for all
    # dequantisation and launches again; transfers to the host come last.
    levers: list[Callable[[TrainPlan], Rung | None]] = [
        _keep_less,
        _no_graphs,
        _smaller_micro_batch,
        _recomputation,
        _smaller_loss_chunk,
        _smaller_parts,
        _offloading,
        _optimizer_offloading,
    ]
    if phase == EVALUATION_PHASE:
        levers.insert(0, _smaller_eval_batch)
    if allow_degraded:
        levers += [_shorter_rows, _lower_rank]
    for lever in levers:
        while (rung := lever(plan)) is not None:
            yield rung
            plan = plan.with_settings(**rung.values)


def _smaller_eval_batch(plan: TrainPlan) -> Rung | None:
    if plan.memory.eval_batch_size == 1:
        return None
    size = plan.memory.eval_batch_size // 2
    return Rung({"eval_batch_size": size}, f"evaluation batch of {size}")


def _keep_less(plan: TrainPlan) -> Rung | None:
    # Less room comes before a smaller micro-batch, whose rows would fill the same room again.
    if plan.memory.kernels == "plain":
        return None
    size = max(_least_bytes(plan), int(KEPT_SHARE * plan.memory.activation_bytes))
    if size >= plan.memory.activation_bytes:
        return None
    values = {"activation_bytes": size, "gradient_checkpointing": True}
    return Rung(values, f"{size_text(size)} for a row's activations")


def _no_graphs(plan: TrainPlan) -> Rung | None:
    # Beside graphs the loss and evaluations have memory of their own.
    if not plan.memory.graphs:
        return None
    return Rung({"graphs": False}, "kernels are launched one by one")


def _least_bytes(plan: TrainPlan) -> int:
    """Return the fewest bytes that the largest row can take."""
    work = workload_of(plan)
    sizes = FusedSizes(work)
    return sizes.row_bytes(work.tokens, sizes.levels(work.tokens, 0))


def _smaller_micro_batch(plan: TrainPlan) -> Rung | None:
    effective = plan.effective_batch_size
    size = largest_micro_batch_below(effective, plan.memory.micro_batch_size)
    if size is None:
        return None
    values = {"micro_batch_size": size}
    if plan.memory.kernels == "fused":
        values["activation_bytes"] = _least_bytes(plan.with_settings(**values))
    return Rung(values, f"micro-batch of {size}, accumulated {effective // size} times")


def largest_micro_batch_below(effective: int, current: int) -> int | None:
    """Return the largest divisor of `effective` that is at most half of `current`, or None."""
    return next((size for size in divisors(effective) if 2 * size <= current), None)


def _recomputation(plan: TrainPlan) -> Rung | None:
    if plan.memory.gradient_checkpointing or plan.memory.kernels == "fused":
        return None
    return Rung({"gradient_checkpointing": True}, "activations are recomputed")


def _smaller_loss_chunk(plan: TrainPlan) -> Rung | None:
    # A chunk longer than the micro-batch is the whole micro-batch: halving it changes nothing.
    size = min(plan.memory.loss_chunk_tokens, workload_of(plan).tokens) // 2
    if size < SMALLEST_LOSS_CHUNK_TOKENS:
        return None
    return Rung({"loss_chunk_tokens": size}, f"loss chunks of {size} tokens")


def _smaller_parts(plan: TrainPlan) -> Rung | None:
    """Run the MLP for fewer tokens, and attention's gradient for fewer heads, at one time."""
    if plan.memory.kernels == "plain":
        return None
    values: dict[str, Any] = {}
    if (tokens := plan.memory.chunk_tokens // 2) >= SMALLEST_MLP_CHUNK_TOKENS:
        values["chunk_tokens"] = tokens
    groups = 2 * plan.memory.head_groups
    if plan.model.shape.num_key_value_heads % groups == 0:
        values["head_groups"] = groups
    if not values:
        return None
    lower = plan.with_settings(**values)
    values["activation_bytes"] = _least_bytes(lower)
    chunk, groups = lower.memory.chunk_tokens, lower.memory.head_groups
    return Rung(values, f"blocks in parts of {chunk} tokens and 1/{groups} of the heads")


def _offloading(plan: TrainPlan) -> Rung | None:
    if plan.memory.offload_activations or plan.device != "cuda":
        return None
    values: dict[str, Any] = {"offload_activations": True}
    if plan.memory.kernels == "fused":
        values["activation_bytes"] = _least_bytes(plan.with_settings(**values))
    return Rung(values, "activations wait in host memory")


def _optimizer_offloading(plan: TrainPlan) -> Rung | None:
    if plan.memory.offload_optimizer or plan.device != "cuda":
        return None
    return Rung({"offload_optimizer": True}, "the optimizer's moments wait in host memory")


def without_host_memory(plan: TrainPlan) -> Rung | None:
    """Return a rung that takes less host memory, at the GPU's cost; None if there is none."""
    if plan.memory.offload_attention:
        values: dict[str, Any] = {"offload_attention": False}
        what = "attention is computed again instead of waiting in host memory"
    elif plan.memory.offloaded_mlp_blocks:
        values, what = {"offloaded_mlp_blocks": 0}, "no activations wait in host memory"
    elif plan.memory.offload_activations:
        values, what = {"offload_activations": False}, "activations stay on the GPU"
    else:
        return None
    # What is no longer offloaded needs room on the GPU, which may not be there.
    lower = plan.with_settings(**values)
    if plan.memory.kernels == "fused" and "offloaded_mlp_blocks" not in values:
        values["activation_bytes"] = _least_bytes(lower)
        lower = repredict(lower.with_settings(**values))
        if lower.predicted_peak_bytes > plan.max_memory_gb * GIB:
            return None
    return Rung(values, what)


def _shorter_rows(plan: TrainPlan) -> Rung | None:
    # Half the length that rows really have: halving a limit above it would change nothing.
    longest = min(plan.max_sequence_length, workload_of(plan).sequence_tokens)
    tokens = longest // 2 // 8 * 8
    if tokens < SMALLEST_SEQUENCE_TOKENS:
        return None
    return Rung({"max_sequence_length": tokens}, f"rows of at most {tokens} tokens", False)


def _lower_rank(plan: TrainPlan) -> Rung | None:
    rank = plan.adapter.r // 2
    if rank < SMALLEST_RANK:
        return None
    # Alpha follows the rank, so that the scale alpha / r stays.
    alpha = max(1, round(plan.adapter.alpha * rank / plan.adapter.r))
    trainable = count_adapter_parameters(plan.model.shape, rank)
    adapter = plan.adapter.model_copy(
        update={"r": rank, "alpha": alpha, "trainable_parameters": trainable}
    )
    return Rung({"adapter": adapter}, f"adapter of rank {rank}", False)
