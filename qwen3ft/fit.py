"""Which settings fit the memory budget: the fastest that is predicted to.

Guarantees: pure and deterministic; what is returned fits, and what is refused is refused with each
part of the prediction and with what would fit. Sizes follow the device's total, not what is free at
the moment: what other programs hold is for the environment check and for recovery.
"""

from __future__ import annotations

import bisect
import itertools
import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Literal

from qwen3ft.config import TrainingConfig
from qwen3ft.data_records import DatasetManifest
from qwen3ft.errors import ConfigError, InsufficientMemoryError
from qwen3ft.footprint import Workload, predict_memory
from qwen3ft.fused_fit import (
    PLAIN_REASONS,
    fastest_fused,
    fused_or_why_not,
    fused_reasons,
    most_frugal_fused,
)
from qwen3ft.records import (
    GIB,
    AdapterSpec,
    EnvironmentReport,
    MemoryPart,
    ModelShape,
    ModelSnapshot,
)

LOSS_CHUNK_TOKENS = 4096
SMALLEST_LOSS_CHUNK_TOKENS = 256
LAST_RESORT_LOSS_CHUNK_TOKENS = 128
"""Taken only where nothing else fits; it leaves recovery no smaller one."""

KEEP_ALL_SHARE = 0.85
"""Share of the budget up to which nothing is recomputed; what lies above is a reserve."""

CPU_EVAL_BATCH_SIZE = 32
LARGEST_FUSED_EVAL_BATCH = 64
PADDING_MULTIPLE_TOKENS = 8


@dataclass(frozen=True)
class Fit:
    """A workload that fits, what it takes, and why it was taken."""

    work: Workload
    parts: tuple[MemoryPart, ...]
    budget_gb: float
    reasons: dict[str, str]


def choose_workload(
    config: TrainingConfig,
    environment: EnvironmentReport,
    model: ModelSnapshot,
    adapter: AdapterSpec,
    dataset: DatasetManifest,
) -> Fit:
    """The first candidate that fits."""
    budget_gb, budget_reason = _budget(config, environment)
    first = Workload(
        device=environment.device,
        compute_dtype=model.compute_dtype,
        quantization=model.quantization,
        micro_batch_size=1,
        sequence_tokens=padded_length(dataset.train.longest_tokens, config.max_sequence_length),
        gradient_checkpointing=config.gradient_checkpointing != "off",
        loss_chunk_tokens=SMALLEST_LOSS_CHUNK_TOKENS,
        packing=_wants_packing(config, environment.device),
        eval_tokens=padded_length(dataset.dev.longest_tokens, config.max_sequence_length),
    )
    kernels, why = _kernels(config, environment, model, adapter)
    device = (
        environment.gpus[0].name + " is there."
        if environment.gpus
        else "No CUDA device is visible."
    )
    given = {"max_memory_gb": budget_reason, "device": device, "kernels": why}
    if kernels == "fused":
        fused = fastest_fused(
            first,
            model.shape,
            adapter,
            int(budget_gb * GIB),
            effective_batch_size=config.effective_batch_size,
            typical_tokens=-(-dataset.train.tokens // dataset.train.rows),
            recompute=config.gradient_checkpointing,
            host_bytes=environment.host_total_bytes,
        )
        if fused is not None:
            eval_rows = max(1, fused.capacity_tokens // fused.eval_tokens)
            fused = replace(fused, eval_batch_size=min(eval_rows, LARGEST_FUSED_EVAL_BATCH))
            parts = predict_memory(model.shape, adapter, fused)
            reasons = fused_reasons(
                config.effective_batch_size, fused, total_bytes(parts), budget_gb
            )
            return Fit(fused, parts, budget_gb, reasons | given)
        given["kernels"] = "The fused path does not fit; the plain one is tried."
    for work, share in _candidates(config, first):
        limit_bytes = int(share * budget_gb * GIB)
        if total_bytes(predict_memory(model.shape, adapter, work)) <= limit_bytes:
            work = _with_evaluation(model.shape, adapter, work, limit_bytes)
            parts = predict_memory(model.shape, adapter, work)
            reasons = _memory_reasons(config, work, total_bytes(parts), budget_gb)
            return Fit(work, parts, budget_gb, reasons | given)
    frugal = _most_frugal(replace(first, packing=config.packing == "on"))
    if kernels == "fused":
        fused = most_frugal_fused(first, model.shape, adapter, environment.host_free_bytes)
        frugal = min(
            (frugal, fused), key=lambda w: total_bytes(predict_memory(model.shape, adapter, w))
        )
    raise _nothing_fits(model.shape, adapter, frugal, budget_gb, config, environment)


def _kernels(
    config: TrainingConfig,
    environment: EnvironmentReport,
    model: ModelSnapshot,
    adapter: AdapterSpec,
) -> tuple[Literal["fused", "plain"], str]:
    """Which path, and why.

    Raises:
        ConfigError: the fused path was asked for and cannot run.
    """
    if config.kernels == "plain":
        return "plain", "Configured as 'plain'."
    problem = fused_or_why_not(environment, model, adapter)
    if config.packing == "off":
        problem = "packing is 'off', and the fused path runs packed rows alone."
    if config.kernels == "auto":
        if problem is None:
            return "fused", "Forward and backward written out, which is several times faster."
        return "plain", f"transformers' and PEFT's own. {problem}"
    if problem is None or not (environment.gpus or adapter.dropout or config.packing == "off"):
        return "fused", "Configured as 'fused'."
    raise ConfigError(
        "kernels is 'fused', but the fused path cannot run.",
        why=problem,
        next_command="qwen3ft plan --set kernels=auto",
    )


def _budget(config: TrainingConfig, environment: EnvironmentReport) -> tuple[float, str]:
    """The budget in GB, never above what the device has, and why."""
    if environment.gpus:
        total_gb, what = environment.gpus[0].total_bytes / GIB, "the card"
    else:
        total_gb, what = environment.host_total_bytes / GIB, "this machine"
    if config.max_memory_gb > total_gb:
        return total_gb, (
            f"{config.max_memory_gb:g} GB were allowed, but {what} has {total_gb:.2f} GB in all."
        )
    return config.max_memory_gb, f"As configured; {what} has {total_gb:.2f} GB."


def _candidates(config: TrainingConfig, first: Workload) -> Iterator[tuple[Workload, float]]:
    """Workloads from fast to frugal, each with the share of the budget it may take.

    Recomputation comes before a smaller micro-batch: it costs about a third more compute, while
    halving the micro-batch pays the dequantisation of all weights and every kernel launch twice.
    Padded rows come before it too, where it is the wide mask of a packed row that does not fit.
    """
    modes = {"auto": (False, True), "on": (True,), "off": (False,)}[config.gradient_checkpointing]
    packings = (True, False) if first.packing and config.packing == "auto" else (first.packing,)
    for micro_batch_size in _divisors(config.effective_batch_size):
        if micro_batch_size > config.batch_size:
            continue
        for packing, recompute in itertools.product(packings, modes):
            chunk_tokens = LOSS_CHUNK_TOKENS
            while chunk_tokens >= SMALLEST_LOSS_CHUNK_TOKENS:
                work = replace(
                    first,
                    micro_batch_size=micro_batch_size,
                    packing=packing,
                    gradient_checkpointing=recompute,
                    loss_chunk_tokens=chunk_tokens,
                )
                yield work, (1.0 if recompute or len(modes) == 1 else KEEP_ALL_SHARE)
                chunk_tokens //= 2
    yield _most_frugal(replace(first, packing=packings[-1])), 1.0


def _wants_packing(config: TrainingConfig, device: str) -> bool:
    """On a GPU, where each micro-batch costs; on a CPU it was measured no faster than padding."""
    return config.packing == "on" or (config.packing == "auto" and device == "cuda")


def _most_frugal(first: Workload) -> Workload:
    """One row at a time, and everything else that keeps the result."""
    return replace(
        first,
        loss_chunk_tokens=LAST_RESORT_LOSS_CHUNK_TOKENS,
        offload_activations=first.device == "cuda" and first.gradient_checkpointing,
    )


def _with_evaluation(
    shape: ModelShape, adapter: AdapterSpec, work: Workload, limit_bytes: int
) -> Workload:
    """`work` with the largest evaluation batch worth having.

    On a GPU that is one, up to twice the micro-batch, that does not raise the peak; on a CPU, where
    small batches waste most of the time, one of up to 32 rows that fits.
    """
    wanted = 2 * work.micro_batch_size
    if work.device == "cpu":
        wanted = max(wanted, CPU_EVAL_BATCH_SIZE)
    else:
        limit_bytes = total_bytes(predict_memory(shape, adapter, work))
    while wanted > 1:
        larger = replace(work, eval_batch_size=wanted)
        if total_bytes(predict_memory(shape, adapter, larger)) <= limit_bytes:
            return larger
        wanted //= 2
    return work


def total_bytes(parts: tuple[MemoryPart, ...]) -> int:
    """The predicted peak."""
    return sum(part.bytes for part in parts)


def _memory_reasons(
    config: TrainingConfig, work: Workload, peak_bytes: int, budget_gb: float
) -> dict[str, str]:
    fits = f"the predicted peak is {peak_bytes / GIB:.2f} of {budget_gb:.2f} GB"
    accumulation = config.effective_batch_size // work.micro_batch_size
    if work.micro_batch_size == config.batch_size:
        micro = f"As configured; {fits}."
    else:
        micro = f"The largest divisor of {config.effective_batch_size} that fits; {fits}."
    if config.gradient_checkpointing != "auto":
        recompute = f"Configured as '{config.gradient_checkpointing}'."
    elif work.gradient_checkpointing:
        recompute = f"Keeping all activations would take more than {KEEP_ALL_SHARE:.0%} of budget."
    else:
        recompute = f"All activations fit {KEEP_ALL_SHARE:.0%} of the budget, and that is faster."
    if config.packing != "auto":
        packing = f"Configured as '{config.packing}'."
    elif work.packing:
        packing = (
            f"Up to {work.capacity_tokens} tokens a micro-batch, as {work.micro_batch_size} padded "
            "rows would hold; on a GPU each micro-batch costs, and padding is computed for nothing."
        )
    elif work.device == "cuda":
        packing = "The attention mask of packed rows does not fit; padded rows do."
    else:
        packing = "On a CPU it was measured no faster: attention is as wide as the packed row."
    offload = "Nothing else fits." if work.offload_activations else "Not needed: it is slow."
    return PLAIN_REASONS | {
        "micro_batch_size": micro,
        "gradient_accumulation_steps": f"{work.micro_batch_size} x {accumulation} keeps the "
        f"{config.effective_batch_size} sequences per step that were asked for.",
        "eval_batch_size": f"{work.eval_batch_size} held-out rows of up to {work.eval_tokens} "
        "tokens fit where training does, as nothing is kept for gradients.",
        "gradient_checkpointing": recompute,
        "loss_chunk_tokens": f"Logits of {min(work.loss_chunk_tokens, work.tokens)} tokens at most "
        "exist at one time; larger chunks are faster, smaller ones leaner.",
        "offload_activations": offload,
        "packing": packing,
        "predicted": f"For rows of {work.sequence_tokens} tokens, the longest there are.",
    }


def _nothing_fits(
    shape: ModelShape,
    adapter: AdapterSpec,
    frugal: Workload,
    budget_gb: float,
    config: TrainingConfig,
    environment: EnvironmentReport,
) -> InsufficientMemoryError:
    """The error that says what the most frugal settings need, and what would fit."""
    parts = predict_memory(shape, adapter, frugal)
    need_gb = math.ceil(total_bytes(parts) / GIB * 100) / 100
    advice = [f"max_memory_gb of {need_gb:.2f} or more"]
    fits: dict[str, float | int] = {"max_memory_gb": need_gb}
    host_bytes = environment.host_free_bytes
    tokens = _longest_that_fits(shape, adapter, frugal, budget_gb, host_bytes)
    if tokens is not None:
        advice.append(f"max_sequence_length of {tokens} or less")
        fits["max_sequence_length"] = tokens
    if config.gradient_checkpointing == "off":
        advice.append("gradient_checkpointing: auto")
    advice.append("a smaller model")
    rows = [f"  {part.name:<24}{part.bytes / GIB:8.3f} GB  {part.formula}" for part in parts]
    table = "\n".join([*rows, f"  {'in all':<24}{need_gb:8.3f} GB"])
    return InsufficientMemoryError(
        f"The most frugal settings need {need_gb:.2f} GB, the budget is {budget_gb:.2f} GB:\n"
        + table,
        why=f"{frugal.sequence_tokens} tokens a row, one row at a time. What would fit: "
        + "; ".join(advice)
        + ".",
        next_command=f"qwen3ft plan --set max_memory_gb={need_gb}",
        need_gb=need_gb,
        have_gb=budget_gb,
        parts={part.name: part.bytes for part in parts},
        would_fit=fits,
    )


def _longest_that_fits(
    shape: ModelShape, adapter: AdapterSpec, frugal: Workload, budget_gb: float, host_bytes: int
) -> int | None:
    """The longest row, a multiple of 8 tokens, that fits the budget; None if none does."""
    lengths = range(8, frugal.sequence_tokens, 8)

    def excess_bytes(tokens: int) -> float:
        work = replace(frugal, sequence_tokens=tokens, eval_tokens=min(tokens, frugal.eval_tokens))
        if work.kernels == "fused":
            work = most_frugal_fused(work, shape, adapter, host_bytes)
        return total_bytes(predict_memory(shape, adapter, work)) - budget_gb * GIB

    fitting = bisect.bisect_right(lengths, 0.0, key=excess_bytes)
    return lengths[fitting - 1] if fitting else None


def largest_micro_batch_below(effective: int, current: int) -> int | None:
    """The largest divisor of `effective` that is at most half of `current`; None below 1."""
    return next((size for size in _divisors(effective) if 2 * size <= current), None)


def _divisors(number: int) -> list[int]:
    """Divisors, largest first."""
    small = [size for size in range(1, math.isqrt(number) + 1) if number % size == 0]
    return sorted({*small, *(number // size for size in small)}, reverse=True)


def padded_length(longest_tokens: int, limit_tokens: int) -> int:
    """Tokens of the longest row as the collator pads it, never 0."""
    length = max(1, min(longest_tokens, limit_tokens))
    return -(-length // PADDING_MULTIPLE_TOKENS) * PADDING_MULTIPLE_TOKENS
