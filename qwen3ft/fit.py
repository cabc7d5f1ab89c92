"""Which settings fit the memory budget: the fastest that is predicted to.

Guarantees: pure and deterministic; what is returned fits, and what is refused is refused with each
part of the prediction and with what would fit. Sizes follow the device's total, not what is free at
the moment: what other programs hold is for the environment check and for recovery.
"""

from __future__ import annotations

import bisect
import math
from dataclasses import dataclass, replace
from typing import Literal

from qwen3ft.config import TrainingConfig
from qwen3ft.data_records import DatasetManifest
from qwen3ft.errors import ConfigError, InsufficientMemoryError
from qwen3ft.footprint import Workload, predict_memory, total_bytes
from qwen3ft.fused_fit import fastest_fused, fused_or_why_not, fused_reasons, most_frugal_fused
from qwen3ft.packing import divisors
from qwen3ft.plain_fit import (
    SMALLEST_LOSS_CHUNK_TOKENS,
    candidates,
    most_frugal,
    plain_reasons,
    wants_packing,
    with_evaluation,
)
from qwen3ft.records import (
    GIB,
    AdapterSpec,
    EnvironmentReport,
    MemoryPart,
    ModelShape,
    ModelSnapshot,
)

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
    """The fused settings estimated to be fastest, or the first plain ones that fit."""
    budget_gb, budget_reason = _budget(config, environment)
    first = Workload(
        device=environment.device,
        compute_dtype=model.compute_dtype,
        quantization=model.quantization,
        micro_batch_size=1,
        sequence_tokens=padded_length(dataset.train.longest_tokens, config.max_sequence_length),
        gradient_checkpointing=config.gradient_checkpointing != "off",
        loss_chunk_tokens=SMALLEST_LOSS_CHUNK_TOKENS,
        packing=wants_packing(config, environment.device),
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
    plain = candidates(config, first) if config.kernels != "fused" else ()
    for work, share in plain:
        limit_bytes = int(share * budget_gb * GIB)
        if total_bytes(predict_memory(model.shape, adapter, work)) <= limit_bytes:
            work = with_evaluation(model.shape, adapter, work, limit_bytes)
            parts = predict_memory(model.shape, adapter, work)
            reasons = plain_reasons(config, work, total_bytes(parts), budget_gb)
            return Fit(work, parts, budget_gb, reasons | given)
    frugal = [most_frugal(replace(first, packing=config.packing == "on"))]
    if kernels == "fused":
        frugal.append(most_frugal_fused(first, model.shape, adapter, environment.host_total_bytes))
    if config.kernels == "fused":
        del frugal[0]
    least = min(frugal, key=lambda work: total_bytes(predict_memory(model.shape, adapter, work)))
    raise _nothing_fits(model.shape, adapter, least, budget_gb, config, environment)


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
    host_bytes = environment.host_total_bytes
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
    return next((size for size in divisors(effective) if 2 * size <= current), None)


def padded_length(longest_tokens: int, limit_tokens: int) -> int:
    """Tokens of the longest row as the collator pads it, never 0."""
    length = max(1, min(longest_tokens, limit_tokens))
    return -(-length // PADDING_MULTIPLE_TOKENS) * PADDING_MULTIPLE_TOKENS
