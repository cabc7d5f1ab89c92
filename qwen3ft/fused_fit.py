"""Which settings of the fused path fit the memory budget, and which of them is fastest.

Guarantees: pure and deterministic. Speed is estimated from products alone, in tokens that pass the
model: an absolute prediction it is not, but it weighs fewer micro-batches against less computed
again, which is what the budget is spent on.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator
from dataclasses import replace

from qwen3ft.footprint import Workload, fused_sizes, predict_memory
from qwen3ft.fused_footprint import FusedSizes
from qwen3ft.packing import divisors, row_tokens
from qwen3ft.recompute import Level
from qwen3ft.records import GIB, AdapterSpec, EnvironmentReport, ModelShape, ModelSnapshot

CHUNK_TOKENS = (16384, 8192, 4096, 2048)
LOSS_CHUNK_TOKENS = (2048, 1024, 512, 256, 128)
FLOPS_PER_SECOND = 600e12
"""Of large bf16 products on an H200, measured in the step; slower cards make launches cheaper by
comparison, so they are only ever given too few micro-batches, which costs little."""

LAUNCH_SECONDS_PER_BLOCK = 4e-3
"""Time in which the host queues one block's forward and backward, measured: no micro-batch takes
less."""

WEIGHT_PASS_TOKENS = 200
"""Dequantising weights once takes about as long as passing this many tokens through them: 2.5 bytes
a weight at 4.8 TB/s, against 2 operations a token and weight at 800 TFLOP/s, on an H200; cards
from the RTX 4090 on have about that ratio."""

OFFLOAD_BYTES_PER_SECOND = 20e9
"""Between device and host, a modest PCIe 4.0 x 16; it runs beside the computation."""

OVERLAPPED_BYTES_PER_SECOND = 33e9
"""What the forward of an H200 may send to the host: PCIe 5.0 x 16 takes 50e9. A card at half of
that bus, PCIe 4.0, has less than half the speed too, so it has the time."""

HOST_SHARE = 0.5
"""Of the host's memory, what may hold activations: it is pinned, and others need the rest."""

OLDEST_CAPABILITY = (8, 0)
"""Ampere: the first with bfloat16, which the kernels are written for."""


def fused_or_why_not(
    environment: EnvironmentReport, model: ModelSnapshot, adapter: AdapterSpec
) -> str | None:
    """None if the fused path can run here, else what is missing."""
    if adapter.dropout:
        return f"lora_dropout is {adapter.dropout:g}; the fused path has none."
    if not environment.gpus:
        return "No CUDA device is visible; on a CPU the fused path has no faster kernels."
    gpu = environment.gpus[0]
    capability = tuple(int(part) for part in (gpu.compute_capability or "0.0").split("."))
    if capability < OLDEST_CAPABILITY or model.compute_dtype != "bfloat16":
        return f"{gpu.name} has no bfloat16 (compute capability {gpu.compute_capability})."
    if "triton" not in environment.versions:
        return "Triton is not installed."
    return None


def fastest_fused(
    first: Workload,
    shape: ModelShape,
    adapter: AdapterSpec,
    limit_bytes: int,
    *,
    effective_batch_size: int,
    typical_tokens: int,
    recompute: str,
    host_bytes: int,
) -> Workload | None:
    """The settings estimated to be fastest among those that fit; None if none does.

    Args:
        first: What is given: model, precision, longest rows.
        shape: Of the model.
        adapter: Of the run.
        limit_bytes: The budget.
        effective_batch_size: Sequences per optimizer step.
        typical_tokens: Mean length of a sequence.
        recompute: `config.gradient_checkpointing`.
        host_bytes: Memory of the host.
    """
    best: tuple[float, Workload] | None = None
    for work in _candidates(first, shape, effective_batch_size):
        if not work.offload_activations and first.device == "cuda" and recompute == "auto":
            work = replace(
                work,
                offloaded_mlp_blocks=_blocks_offloaded_in_time(
                    work, shape, HOST_SHARE * host_bytes
                ),
            )
        if _host_bytes(work, shape, adapter) > HOST_SHARE * host_bytes:
            continue
        fitted = _fill(work, shape, adapter, limit_bytes, recompute)
        if fitted is None:
            continue
        seconds = _step_seconds(fitted, shape, adapter, effective_batch_size, typical_tokens)
        if best is None or seconds < best[0]:
            best = seconds, fitted
    return best[1] if best else None


def most_frugal_fused(
    first: Workload, shape: ModelShape, adapter: AdapterSpec, host_bytes: int
) -> Workload:
    """One sequence at a time, and everything else at its least."""
    work = next(
        work
        for work in reversed(list(_candidates(first, shape, 1)))
        if _host_bytes(work, shape, adapter) <= HOST_SHARE * host_bytes
    )
    sizes, blocks = fused_sizes(shape, adapter, work), shape.num_hidden_layers
    recomputed = sizes.levels(work.tokens, 0)
    levels = recomputed if first.gradient_checkpointing else (Level.KEEP_ALL,) * blocks
    return replace(work, activation_bytes=sizes.row_bytes(work.tokens, levels))


def fused_reasons(
    effective_batch_size: int, work: Workload, peak_bytes: int, budget_gb: float
) -> dict[str, str]:
    """Why each derived setting is what it is."""
    accumulation = effective_batch_size // work.micro_batch_size
    room_gb = work.activation_bytes / GIB
    return {
        "micro_batch_size": f"Packed rows of up to {work.capacity_tokens} tokens, estimated to be "
        f"the fastest split; the predicted peak is {peak_bytes / GIB:.2f} of {budget_gb:.2f} GB.",
        "gradient_accumulation_steps": f"{work.micro_batch_size} x {accumulation} keeps the "
        f"{effective_batch_size} sequences per step that were asked for.",
        "eval_batch_size": "As many held-out rows as a packed row of training holds.",
        "gradient_checkpointing": f"A row may take {room_gb:.2f} GB: what of its blocks does not "
        "fit that is computed again, cheapest parts first."
        if work.gradient_checkpointing
        else f"All activations of the largest row fit: {room_gb:.2f} GB.",
        "loss_chunk_tokens": f"Logits of {min(work.loss_chunk_tokens, work.tokens)} tokens at most "
        "exist at one time; larger chunks are faster, smaller ones leaner.",
        "offload_activations": "Nothing faster fits."
        if work.offload_activations
        else "Not needed.",
        "offload_attention": "Its transfer was estimated to be faster than computing it again."
        if work.offload_attention
        else "Nothing that waits in host memory includes it.",
        "offloaded_mlp_blocks": "The forward has the time to send gate and up of "
        f"{work.offloaded_mlp_blocks} blocks to the host, where they would be computed again."
        if work.offloaded_mlp_blocks
        else "Not used.",
        "activation_bytes": "The largest row with as much kept as is of use or the budget leaves.",
        "packing": "The fused path runs packed rows alone.",
        "chunk_tokens": f"The MLP of {min(work.chunk_tokens, work.tokens)} tokens at one time.",
        "head_groups": f"The gradient of attention in {work.head_groups} part(s) of the heads.",
        "predicted": f"For rows of {work.sequence_tokens} tokens, the longest there are.",
    }


def _candidates(first: Workload, shape: ModelShape, effective: int) -> Iterator[Workload]:
    sizes = divisors(effective)
    groups = [n for n in (1, 2, 4, 8) if shape.num_key_value_heads % n == 0]
    # (what blocks keep, attention's output too)
    offloads = [(False, False)]
    if first.device == "cuda" and first.gradient_checkpointing:
        offloads += [(True, True), (True, False)]
    for size, chunk, loss, group, (offload, attention) in itertools.product(
        sizes, CHUNK_TOKENS, LOSS_CHUNK_TOKENS, groups, offloads
    ):
        yield replace(
            first,
            kernels="fused",
            packing=True,
            micro_batch_size=size,
            chunk_tokens=chunk,
            loss_chunk_tokens=loss,
            head_groups=group,
            offload_activations=offload,
            offload_attention=attention,
        )


def _fill(
    work: Workload, shape: ModelShape, adapter: AdapterSpec, limit_bytes: int, recompute: str
) -> Workload | None:
    """`work` with as much for its rows as the budget leaves, or None if the least is too much."""
    sizes, blocks = fused_sizes(shape, adapter, work), shape.num_hidden_layers
    least = sizes.row_bytes(work.tokens, sizes.levels(work.tokens, 0))
    most = everything = sizes.row_bytes(work.tokens, (Level.KEEP_ALL,) * blocks)
    if recompute == "on" or work.offload_activations:
        most = least
    elif recompute == "off":
        least = most
    bytes_of = {
        size: sum(
            part.bytes
            for part in predict_memory(shape, adapter, replace(work, activation_bytes=size))
        )
        for size in (least, most)
    }
    if bytes_of[least] > limit_bytes:
        return None
    if bytes_of[most] <= limit_bytes:
        room = most
    else:
        # Slack is a share of it, so the sum is linear in between.
        share = (limit_bytes - bytes_of[least]) / (bytes_of[most] - bytes_of[least])
        room = least + int(share * (most - least))
    return replace(work, activation_bytes=room, gradient_checkpointing=room < everything)


def _blocks_offloaded_in_time(work: Workload, shape: ModelShape, host_bytes: float) -> int:
    """Blocks whose gate and up leave the device while the forward runs, and fit the host."""
    per_token = 2 * work.compute_bytes * shape.intermediate_size
    forward_seconds = 2 * shape.linear_parameters / FLOPS_PER_SECOND  # a token
    in_time = OVERLAPPED_BYTES_PER_SECOND * forward_seconds / per_token
    return int(min(in_time, host_bytes / (per_token * work.tokens)))


def _host_bytes(work: Workload, shape: ModelShape, adapter: AdapterSpec) -> int:
    """Host memory that activations of the largest row take."""
    if not work.offload_activations:
        return 0
    sizes = fused_sizes(shape, adapter, work)
    per_token = sizes.kept_per_token()
    return work.tokens * sum(per_token[level] for level in sizes.levels(work.tokens, 0))


def _step_seconds(
    work: Workload, shape: ModelShape, adapter: AdapterSpec, effective: int, typical_tokens: int
) -> float:
    """Estimated time of a typical optimizer step on an H200, for comparison alone."""
    tokens = effective * typical_tokens
    micro_batches = math.ceil(tokens / work.capacity_tokens)
    row = row_tokens(math.ceil(tokens / micro_batches))
    sizes: FusedSizes = fused_sizes(shape, adapter, work)
    levels = sizes.levels(row, work.activation_bytes)
    head = shape.vocab_size * shape.hidden_size
    chunks = math.ceil(row / work.chunk_tokens)
    passes = (
        1
        + 0.1 * chunks
        + 0.5 * head / shape.linear_parameters * math.ceil(row / work.loss_chunk_tokens)
    )
    operations = sizes.operations(row, levels, typical_tokens)
    operations += 4 * shape.linear_parameters * WEIGHT_PASS_TOKENS * passes
    # Groups of heads read the same tensors again.
    seconds = operations * (1 + 0.01 * (work.head_groups - 1)) / FLOPS_PER_SECOND
    seconds = max(seconds, LAUNCH_SECONDS_PER_BLOCK * shape.num_hidden_layers)
    if work.offload_activations:
        transfer = 2 * _host_bytes(work, shape, adapter) * row / work.tokens
        seconds = 1.1 * max(seconds, transfer / OFFLOAD_BYTES_PER_SECOND)
    return micro_batches * seconds
