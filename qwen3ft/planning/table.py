"""A plan as a table that a person understands in ten seconds: what fits, how fast, and why.

Guarantees: pure; everything in it is taken from the plan, nothing is decided here. It is the same
table on the terminal, on a run's pages in Prefect and MLflow, and as JSON.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import replace

from qwen3ft.config import TrainingConfig
from qwen3ft.planning.fit import Fit, kernels_of
from qwen3ft.planning.footprint import predict_memory, total_bytes
from qwen3ft.planning.fused_footprint import FusedSizes
from qwen3ft.planning.gpu_specs import GpuSpec, find_gpu_spec
from qwen3ft.planning.packing import row_tokens
from qwen3ft.planning.recompute import Level
from qwen3ft.planning.refusal import LONGEST_TOKENS, least_workload, longest_that_fits
from qwen3ft.planning.speed import SpeedEstimate, estimate_speed
from qwen3ft.planning.workload import FitRequest, Workload, request_for, workload_of
from qwen3ft.records.base import Record
from qwen3ft.records.machine import EnvironmentReport
from qwen3ft.records.plan import MemoryPart, TrainPlan
from qwen3ft.records.run_card import SettingLine
from qwen3ft.units import GIB, gb

ELSEWHERE = ("H200", "H100", "A100 80GB", "L4", "RTX 5090", "RTX 4090", "RTX 3090", "RTX 3060")
"""Cards that a plan's speed is shown for, where they have the memory."""


class PlanTable(Record):
    """What a plan comes to. Sizes in GB of 2**30 bytes; speeds are estimates."""

    title: str
    headline: str
    settings: tuple[SettingLine, ...]
    parts: tuple[MemoryPart, ...]
    peak_gb: float
    budget_gb: float
    speed: SpeedEstimate | None
    elsewhere: tuple[SpeedEstimate, ...] = ()
    least_gb: float | None = None
    longest_tokens: int | None = None
    notes: tuple[str, ...] = ()


def shape_table(request: FitRequest, fit: Fit, card: GpuSpec | None, fill: float) -> PlanTable:
    """The table of a plan from shapes, with what else the budget would do.

    Args:
        request: What was asked.
        fit: What was chosen.
        card: Where it would run, if it is a known one.
        fill: Mean length of a row as a share of the longest, which is an assumption.
    """
    kernels, _ = kernels_of(request)
    least = predict_memory(least_workload(request, kernels))
    others = [other for name in ELSEWHERE if (other := find_gpu_spec(name)) and other != card]
    able = [other for other in others if other.memory_gb >= 0.99 * fit.budget_gb]
    speeds = [_speed(request, fit.work, other) for other in able]
    longest_rows = _with_longest_rows(request)
    notes = [f"Rows of {fill:g} x {request.config.max_sequence_length:,} tokens on average."]
    if request.environment.gpus and not request.environment.gpus[0].uuid:
        host_gb = gb(request.environment.host_total_bytes)
        notes.append(f"A machine with {host_gb:.0f} GB of memory beside the card.")
    if request.longest_tokens > request.shape.max_position_embeddings:
        notes.append(
            f"{request.model_name} was made for {request.shape.max_position_embeddings:,} tokens."
        )
    return _table(request, fit, card).model_copy(
        update={
            "elsewhere": tuple(speed for speed in speeds if speed is not None),
            "least_gb": gb(total_bytes(least)),
            "longest_tokens": longest_that_fits(longest_rows, kernels, fit.budget_gb * GIB),
            "notes": tuple(notes),
        }
    )


def run_table(config: TrainingConfig, environment: EnvironmentReport, plan: TrainPlan) -> PlanTable:
    """The table of a run's plan."""
    request = request_for(config, environment, plan.model, plan.adapter, plan.dataset)
    fit = Fit(workload_of(plan), plan.predicted, plan.max_memory_gb, plan.reasons)
    card = find_gpu_spec(environment.gpus[0].name) if environment.gpus else None
    table = _table(request, fit, card)
    return table.model_copy(update={"settings": (*table.settings, *_of_the_run(plan))})


def kept_by_typical_row(request: FitRequest, work: Workload) -> Sequence[Level]:
    """Per block, what becomes of the activations of a row of typical length (fused path)."""
    tokens = request.config.effective_batch_size * request.typical_tokens
    rows = math.ceil(tokens / work.capacity_tokens)
    row = row_tokens(math.ceil(tokens / rows))
    return FusedSizes(work).levels(row, work.memory.activation_bytes)


def _with_longest_rows(request: FitRequest) -> FitRequest:
    return replace(request, longest_tokens=LONGEST_TOKENS, held_out_tokens=LONGEST_TOKENS)


def _speed(request: FitRequest, work: Workload, card: GpuSpec | None) -> SpeedEstimate | None:
    if card is None:
        return None
    return estimate_speed(
        card,
        work,
        sequences_per_step=request.config.effective_batch_size,
        typical_tokens=request.typical_tokens,
    )


def _table(request: FitRequest, fit: Fit, card: GpuSpec | None) -> PlanTable:
    gpus = request.environment.gpus
    where = gpus[0].name if gpus else "the CPU"
    peak_gb = gb(total_bytes(fit.parts))
    speed = _speed(request, fit.work, card)
    name = request.model_name.rstrip("/").rpartition("/")[2]
    headline = f"Fits: up to {peak_gb:.2f} of {fit.budget_gb:g} GB"
    if speed is not None:
        headline += f", about {_rounded(speed.tokens_per_second)} tokens/s ({speed.basis})"
    else:
        headline += "; no estimate of speed for " + ("this card" if gpus else "a CPU")
    return PlanTable(
        title=f"{name} on {where}, {fit.budget_gb:g} GB, rows of up to "
        f"{request.longest_tokens:,} tokens",
        headline=headline + ".",
        settings=tuple(_settings(request, fit)),
        parts=fit.parts,
        peak_gb=peak_gb,
        budget_gb=fit.budget_gb,
        speed=speed,
    )


def _settings(request: FitRequest, fit: Fit) -> list[SettingLine]:
    """Those that a person asks about; the others are in the plan itself."""
    work, why = fit.work, fit.reasons
    effective = request.config.effective_batch_size
    return [
        SettingLine(
            name="batch",
            value=f"{work.memory.micro_batch_size} x {effective // work.memory.micro_batch_size}",
            why=why["micro_batch_size"],
        ),
        SettingLine(
            name="computed again",
            value=_recomputed_text(request, work),
            why=why["gradient_checkpointing"],
        ),
        SettingLine(
            name="host memory",
            value=_in_host_memory(request, work),
            why=why[_host_reason(request, work)],
        ),
        SettingLine(
            name="loss",
            value=f"{min(work.memory.loss_chunk_tokens, work.tokens):,} tokens at a time",
            why=why["loss_chunk_tokens"],
        ),
        SettingLine(name="kernels", value=work.memory.kernels, why=why["kernels"]),
        SettingLine(name="budget", value=f"{fit.budget_gb:g} GB", why=why["max_memory_gb"]),
    ]


def _in_host_memory(request: FitRequest, work: Workload) -> str:
    """What waits there."""
    waiting = []
    if work.memory.offload_activations:
        waiting.append("activations")
    elif away := _blocks_away(request, work):
        waiting.append(f"gate and up of {away} blocks")
    if work.memory.offload_optimizer:
        waiting.append("AdamW's moments")
    return ", ".join(waiting) or "not used"


def _blocks_away(request: FitRequest, work: Workload) -> int:
    """Blocks of a typical row whose gate and up wait there."""
    if work.memory.kernels == "plain":
        return 0
    return list(kept_by_typical_row(request, work)).count(Level.OFFLOAD_GATE_UP)


def _host_reason(request: FitRequest, work: Workload) -> str:
    """The setting whose reason says most about it."""
    if not work.memory.offload_activations and _blocks_away(request, work):
        return "offloaded_mlp_blocks"
    if work.memory.offload_optimizer and not work.memory.offload_activations:
        return "offload_optimizer"
    return "offload_activations"


def _of_the_run(plan: TrainPlan) -> Iterator[SettingLine]:
    """What only a plan with rows has."""
    train, why = plan.dataset.train, plan.reasons
    yield SettingLine(
        name="data",
        value=f"{train.rows:,} rows, {train.tokens:,} tokens",
        why=f"{plan.dataset.dev.rows:,} rows are held out for stopping, {plan.dataset.test_rows:,} "
        "for the test.",
    )
    yield SettingLine(
        name="adapter",
        value=f"r {plan.adapter.r}, alpha {plan.adapter.alpha}",
        why=f"{plan.adapter.trainable_parameters:,} parameters are trained.",
    )
    yield SettingLine(name="steps", value=f"{plan.total_steps:,} at most", why=why["total_steps"])
    yield SettingLine(
        name="evaluation",
        value=f"every {plan.evaluate_every_steps} steps",
        why=why["evaluate_every_steps"],
    )


def _recomputed_text(request: FitRequest, work: Workload) -> str:
    """What the backward of a typical row computes again, in words."""
    if work.memory.kernels == "plain":
        return "everything" if work.memory.gradient_checkpointing else "nothing"
    blocks = Counter(level.repeats for level in kept_by_typical_row(request, work))
    if len(blocks) == 1:
        return next(iter(blocks))
    told = [f"{words} in {count}" for words, count in blocks.items() if words != "nothing"]
    return "; ".join(told) + f" of {blocks.total()} blocks"


def _rounded(tokens_per_second: float) -> str:
    """Three digits: more would pretend."""
    digits = max(0, math.floor(math.log10(max(tokens_per_second, 1))) - 2)
    return f"{round(tokens_per_second / 10**digits) * 10**digits:,}"
