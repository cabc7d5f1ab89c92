"""Choose the fastest settings that are predicted to fit the memory budget.

Pure and deterministic; what is returned fits, and a refusal lists each part of the prediction and
what would fit (`qwen3ft.planning.refusal`).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from qwen3ft.config import TrainingConfig
from qwen3ft.errors import ConfigError
from qwen3ft.planning.footprint import predict_memory, total_bytes
from qwen3ft.planning.fused_search import fastest_fused, why_not_fused
from qwen3ft.planning.gpu_specs import find_gpu_spec
from qwen3ft.planning.plain_settings import plain_candidates, with_evaluation
from qwen3ft.planning.reasons import fused_reasons, plain_reasons
from qwen3ft.planning.refusal import nothing_fits
from qwen3ft.planning.workload import FitRequest, Workload
from qwen3ft.records.machine import EnvironmentReport
from qwen3ft.records.plan import MemoryPart
from qwen3ft.units import GIB, gb

LARGEST_FUSED_EVAL_BATCH = 64


@dataclass(frozen=True)
class Fit:
    """A workload that fits, its predicted memory, and a reason for each derived setting."""

    work: Workload
    parts: tuple[MemoryPart, ...]
    budget_gb: float
    reasons: dict[str, str]


def choose(request: FitRequest) -> Fit:
    """Return the fused settings estimated to be fastest, or the first plain ones that fit.

    Raises:
        InsufficientMemoryError: Nothing fits; lists each part, and what would fit.
        ConfigError: The fused path was asked for and cannot run.
    """
    fit = fit_or_none(request)
    if fit is None:
        budget_gb, _ = _budget(request.config, request.environment)
        raise nothing_fits(request, kernels_of(request)[0], budget_gb)
    return fit


def fit_or_none(request: FitRequest) -> Fit | None:
    """Choose as `choose` does, but return None if nothing fits."""
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
        recompute=request.config.gradient_checkpointing,
        host_bytes=request.host_bytes,
        gpu=find_gpu_spec(gpus[0].name) if (gpus := request.environment.gpus) else None,
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
    # The leanest comes last: if it does not fit, a refusal need not try the others.
    every = list(plain_candidates(config, first))
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
    """Return the path that is tried first, and why.

    Raises:
        ConfigError: The fused path was asked for and cannot run.
    """
    config, environment, adapter = request.config, request.environment, request.adapter
    if config.kernels == "plain":
        return "plain", "Configured as 'plain'."
    problem = why_not_fused(environment, request.compute_dtype, adapter)
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
    """Return the budget in GB, never above what the device has, and why."""
    # The total, not what is free now: a plan should not depend on the moment. What other programs
    # hold is up to the environment check and `qwen3ft.recovery.shared_gpu`.
    if environment.gpus:
        total_gb, what = gb(environment.gpus[0].total_bytes), "the GPU"
    else:
        total_gb, what = gb(environment.host_total_bytes), "this machine"
    if config.max_memory_gb > total_gb:
        return total_gb, (
            f"{config.max_memory_gb:g} GB were allowed, but {what} has {total_gb:.2f} GB in all: "
            "lowered to that."
        )
    return config.max_memory_gb, f"As configured; {what} has {total_gb:.2f} GB."
