"""Which settings fit the memory budget: the fastest that is predicted to.

Guarantees: pure and deterministic; what is returned fits, and what is refused is refused with each
part of the prediction and with what would fit (`qwen3ft.planning.refusal`). Sizes follow the
device's total, not what is free at the moment: what other programs hold is for the environment
check and for recovery.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from qwen3ft.config import TrainingConfig
from qwen3ft.errors import ConfigError
from qwen3ft.planning.footprint import predict_memory, total_bytes
from qwen3ft.planning.fused_search import fastest_fused, fused_or_why_not, fused_reasons
from qwen3ft.planning.packing import divisors
from qwen3ft.planning.plain_settings import candidates, plain_reasons, with_evaluation
from qwen3ft.planning.refusal import nothing_fits
from qwen3ft.planning.workload import FitRequest, Workload, padded_length, request_for
from qwen3ft.records.data import DatasetManifest
from qwen3ft.records.machine import EnvironmentReport
from qwen3ft.records.model import AdapterSpec, ModelSnapshot
from qwen3ft.records.plan import MemoryPart
from qwen3ft.units import GIB, gb

__all__ = [
    "Fit",
    "choose",
    "choose_workload",
    "fit_or_none",
    "kernels_of",
    "largest_micro_batch_below",
    "padded_length",
]

LARGEST_FUSED_EVAL_BATCH = 64


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
    """The fused settings estimated to be fastest, or the first plain ones that fit.

    Raises:
        InsufficientMemoryError: nothing fits; lists each part, and what would fit.
        ConfigError: the fused path was asked for and cannot run.
    """
    return choose(request_for(config, environment, model, adapter, dataset))


def choose(request: FitRequest) -> Fit:
    """As `choose_workload`, without a model or rows on disk."""
    fit = fit_or_none(request)
    if fit is None:
        budget_gb, _ = _budget(request.config, request.environment)
        raise nothing_fits(request, kernels_of(request)[0], budget_gb)
    return fit


def fit_or_none(request: FitRequest) -> Fit | None:
    """As `choose`, but None if nothing fits."""
    config, environment, first = request.config, request.environment, request.smallest_workload
    budget_gb, budget_reason = _budget(config, environment)
    kernels, why = kernels_of(request)
    given = {"max_memory_gb": budget_reason, "device": _device(request), "kernels": why}
    if kernels == "fused":
        if (fused := _fused_fit(request, first, budget_gb, given)) is not None:
            return fused
        given["kernels"] = "The fused path does not fit; the plain one is tried."
    if config.kernels == "fused":
        return None
    return _plain_fit(request, first, budget_gb, given)


def _fused_fit(
    request: FitRequest, first: Workload, budget_gb: float, given: dict[str, str]
) -> Fit | None:
    effective = request.config.effective_batch_size
    work = fastest_fused(
        first,
        int(budget_gb * GIB),
        effective_batch_size=effective,
        typical_tokens=request.typical_tokens,
        recompute=request.config.gradient_checkpointing,
        host_bytes=request.environment.host_total_bytes,
    )
    if work is None:
        return None
    eval_rows = max(1, work.capacity_tokens // work.eval_tokens)
    work = work.with_memory(eval_batch_size=min(eval_rows, LARGEST_FUSED_EVAL_BATCH))
    parts = predict_memory(work)
    reasons = fused_reasons(effective, work, total_bytes(parts), budget_gb)
    return Fit(work, parts, budget_gb, reasons | given)


def _plain_fit(
    request: FitRequest, first: Workload, budget_gb: float, given: dict[str, str]
) -> Fit | None:
    config = request.config
    every = list(candidates(config, first))
    leanest, share = every[-1]
    if total_bytes(predict_memory(leanest)) > int(share * budget_gb * GIB):
        return None
    for work, share in every:
        limit_bytes = int(share * budget_gb * GIB)
        if total_bytes(predict_memory(work)) <= limit_bytes:
            work = with_evaluation(work, limit_bytes)
            parts = predict_memory(work)
            reasons = plain_reasons(config, work, total_bytes(parts), budget_gb)
            return Fit(work, parts, budget_gb, reasons | given)
    return None


def kernels_of(request: FitRequest) -> tuple[Literal["fused", "plain"], str]:
    """Which path is tried first, and why.

    Raises:
        ConfigError: the fused path was asked for and cannot run.
    """
    config, environment, adapter = request.config, request.environment, request.adapter
    if config.kernels == "plain":
        return "plain", "Configured as 'plain'."
    problem = fused_or_why_not(environment, request.compute_dtype, adapter)
    if config.packing == "off":
        problem = "packing is 'off', and the fused path runs packed rows alone."
    if config.kernels == "auto":
        if problem is None:
            return "fused", "Forward and backward written out, which is several times faster."
        return "plain", f"transformers' and PEFT's own. {problem}"
    if problem is None or not (environment.gpus or adapter.dropout or config.packing == "off"):
        why = "" if problem is None else " Without a CUDA device its plain twin runs: slowly."
        return "fused", f"Configured as 'fused'.{why}"
    raise ConfigError(
        "kernels is 'fused', but the fused path cannot run.",
        why=problem,
        next_command="qwen3ft plan --set kernels=auto",
    )


def _device(request: FitRequest) -> str:
    if request.environment.gpus:
        return f"{request.environment.gpus[0].name} is there."
    if request.config.is_embedded:
        return "No CUDA device is visible."
    return (
        "No CUDA device is visible: this trains on the CPU, which is meant for the embedded model "
        "and takes any other one far longer than a GPU."
    )


def _budget(config: TrainingConfig, environment: EnvironmentReport) -> tuple[float, str]:
    """The budget in GB, never above what the device has, and why."""
    if environment.gpus:
        total_gb, what = gb(environment.gpus[0].total_bytes), "the card"
    else:
        total_gb, what = gb(environment.host_total_bytes), "this machine"
    if config.max_memory_gb > total_gb:
        return total_gb, (
            f"{config.max_memory_gb:g} GB were allowed, but {what} has {total_gb:.2f} GB in all: "
            "lowered to that."
        )
    return config.max_memory_gb, f"As configured; {what} has {total_gb:.2f} GB."


def largest_micro_batch_below(effective: int, current: int) -> int | None:
    """The largest divisor of `effective` that is at most half of `current`; None below 1."""
    return next((size for size in divisors(effective) if 2 * size <= current), None)
