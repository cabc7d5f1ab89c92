"""Show a plan as a table: what fits, how fast, and why.

Decides nothing: everything in it is taken from the plan, or from that of one GPU to compare with.
The terminal, a run's pages in Prefect and MLflow, and the JSON show the same table.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace

from qwen3ft.config import TrainingConfig
from qwen3ft.planning.answers import AnswersPlan, answer_lines, plan_answers
from qwen3ft.planning.fit import Fit, fit_or_none, kernels_of
from qwen3ft.planning.footprint import predict_memory, total_bytes
from qwen3ft.planning.gpu_specs import GpuSpec, find_gpu_spec
from qwen3ft.planning.recompute import Level
from qwen3ft.planning.refusal import LONGEST_TOKENS, least_workload, longest_that_fits
from qwen3ft.planning.speed import SpeedEstimate, estimate_speed, typical_levels
from qwen3ft.planning.workload import FitRequest, Workload, request_for, workload_of
from qwen3ft.records.base import Record
from qwen3ft.records.machine import EnvironmentReport
from qwen3ft.records.plan import MemoryPart, TrainPlan
from qwen3ft.records.run_card import SettingLine
from qwen3ft.units import GIB, gb

ELSEWHERE = ("H200", "H100", "A100 80GB", "L4", "RTX 5090", "RTX 4090", "RTX 3090", "RTX 3060")
"""GPUs that a plan's speed is shown for, where they have the memory."""


class PlanTable(Record):
    """Summary of a plan. Sizes are in GB of 2**30 bytes; speeds are estimates."""

    title: str
    headline: str
    settings: tuple[SettingLine, ...]
    parts: tuple[MemoryPart, ...]
    peak_gb: float
    budget_gb: float
    speed: SpeedEstimate | None
    elsewhere: tuple[SpeedEstimate, ...] = ()
    answers: AnswersPlan | None = None
    least_gb: float | None = None
    longest_tokens: int | None = None
    notes: tuple[str, ...] = ()


def shape_table(request: FitRequest, fit: Fit, gpu: GpuSpec | None, fill: float) -> PlanTable:
    """Return the table of a plan from shapes, with what else the budget would allow.

    Args:
        request: The request.
        fit: The settings chosen for it.
        gpu: The GPU it would run on; None if that is unknown.
        fill: Assumed mean length of a row as a share of the longest.
    """
    kernels, _ = kernels_of(request)
    least = predict_memory(least_workload(request, kernels))
    others = [other for name in ELSEWHERE if (other := find_gpu_spec(name)) and other != gpu]
    # A budget of 80 GB is meant for a GPU sold as one of 80 GB, which has a little less.
    able = [other for other in others if other.memory_gb >= 0.99 * fit.budget_gb]
    alone = alone_of(request, fit.work)
    speeds = [speed_of(fit.work, other, alone) for other in able]
    # Rows keep their proportion of typical to longest.
    typical = -(-request.typical_tokens * LONGEST_TOKENS // request.longest_tokens)
    longest = replace(
        request,
        longest_tokens=LONGEST_TOKENS,
        typical_tokens=typical,
        held_out_tokens=LONGEST_TOKENS,
    )
    notes = [f"Rows of {fill:g} x {request.config.max_sequence_length:,} tokens on average."]
    if request.environment.gpus and not request.environment.gpus[0].uuid:
        host_gb = gb(request.environment.host_total_bytes)
        notes.append(f"A machine with {host_gb:.0f} GB of memory beside the GPU.")
    if request.longest_tokens > request.shape.max_position_embeddings:
        notes.append(
            f"{request.model_name} was made for {request.shape.max_position_embeddings:,} tokens."
        )
    table = _table(request, fit, gpu, alone)
    answers = plan_answers(request, fit.parts, fit.budget_gb, gpu)
    return table.model_copy(
        update={
            "settings": (*table.settings, *answer_lines(answers)),
            "answers": answers,
            "elsewhere": tuple(speed for speed in speeds if speed is not None),
            "least_gb": gb(total_bytes(least)),
            "longest_tokens": longest_that_fits(longest, kernels, fit.budget_gb * GIB),
            "notes": tuple(notes),
        }
    )


def run_table(config: TrainingConfig, environment: EnvironmentReport, plan: TrainPlan) -> PlanTable:
    """Return the table of a run's plan."""
    request = request_for(config, environment, plan.model, plan.adapter, plan.dataset)
    fit = Fit(workload_of(plan), plan.predicted, plan.max_memory_gb, plan.reasons)
    gpu = find_gpu_spec(environment.gpus[0].name) if environment.gpus else None
    table = _table(request, fit, gpu, alone_of(request, fit.work))
    answers = plan_answers(request, fit.parts, fit.budget_gb, gpu, plan.dataset)
    lines = (*table.settings, *_run_lines(plan), *answer_lines(answers))
    return table.model_copy(update={"settings": lines, "answers": answers})


def speed_of(
    work: Workload, gpu: GpuSpec | None, alone: Workload | None = None
) -> SpeedEstimate | None:
    """Return the estimated speed of a workload; None where there is no estimate.

    Args:
        work: The settings.
        gpu: The GPU of each rank.
        alone: Result of `alone_of`, to compare with.
    """
    if gpu is None:
        return None
    found = estimate_speed(gpu, work)
    one = alone and estimate_speed(gpu, alone)
    if found is None or not one:
        return found
    speedup = found.tokens_per_second / one.tokens_per_second
    return found.model_copy(update={"speedup": speedup})


def alone_of(request: FitRequest, work: Workload) -> Workload | None:
    """Return what one GPU would run for the steps that `work` shares; None if it shares none."""
    if work.ranks == 1:
        return None
    changes = {"gpus": "1", "hosts": 1}
    fit = fit_or_none(replace(request, config=request.config.model_copy(update=changes)))
    return fit.work if fit else None


def _table(request: FitRequest, fit: Fit, gpu: GpuSpec | None, alone: Workload | None) -> PlanTable:
    gpus = request.environment.gpus
    where = gpus[0].name if gpus else "the CPU"
    peak_gb = gb(total_bytes(fit.parts))
    speed = speed_of(fit.work, gpu, alone)
    name = request.model_name.rstrip("/").rpartition("/")[2]
    headline = f"Fits: up to {peak_gb:.2f} of {fit.budget_gb:g} GB"
    if speed is not None:
        headline += f", about {_rounded(speed.tokens_per_second)} tokens/s ({speed.basis})"
    else:
        headline += "; no estimate of speed for " + ("this GPU" if gpus else "a CPU")
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


def _settings(request: FitRequest, fit: Fit) -> Iterator[SettingLine]:
    """Yield the lines people ask about; every other setting is in the plan itself."""
    work, memory = fit.work, fit.work.memory
    accumulation = request.config.effective_batch_size // memory.micro_batch_size
    logits_tokens = min(memory.loss_chunk_tokens, work.tokens)
    for name, value, setting in (
        ("batch", f"{memory.micro_batch_size} x {accumulation}", "micro_batch_size"),
        ("computed again", _recomputed_text(work), "gradient_checkpointing"),
        ("host memory", _offloaded_text(work), _host_reason(work)),
        ("loss", f"{logits_tokens:,} tokens at a time", "loss_chunk_tokens"),
        ("kernels", memory.kernels, "kernels"),
        *((("launches", "CUDA graphs", "graphs"),) if memory.graphs else ()),
        *((("ranks", f"{work.ranks}", "places"),) if work.ranks > 1 else ()),
        ("budget", f"{fit.budget_gb:g} GB", "max_memory_gb"),
    ):
        yield SettingLine(name=name, value=value, why=fit.reasons[setting])


def _offloaded_text(work: Workload) -> str:
    """Return what waits in host memory, in words."""
    waiting = []
    if work.memory.offload_activations:
        waiting.append("activations")
    elif blocks := _offloaded_blocks(work):
        waiting.append(f"gate and up of {blocks} blocks")
    if work.memory.offload_optimizer:
        waiting.append("AdamW's moments")
    return ", ".join(waiting) or "not used"


def _offloaded_blocks(work: Workload) -> int:
    """Return the blocks of a typical row whose gate and up wait in host memory."""
    if work.memory.kernels == "plain":
        return 0
    return typical_levels(work).count(Level.OFFLOAD_GATE_UP)


def _host_reason(work: Workload) -> str:
    """Return the setting whose reason says most about host memory."""
    if not work.memory.offload_activations and _offloaded_blocks(work):
        return "offloaded_mlp_blocks"
    if work.memory.offload_optimizer and not work.memory.offload_activations:
        return "offload_optimizer"
    return "offload_activations"


def _run_lines(plan: TrainPlan) -> Iterator[SettingLine]:
    """Yield the lines that only a plan with rows has."""
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


def _recomputed_text(work: Workload) -> str:
    """Return what the backward of a typical row recomputes, in words."""
    if work.memory.kernels == "plain":
        return "everything" if work.memory.gradient_checkpointing else "nothing"
    blocks = Counter(level.recomputed for level in typical_levels(work))
    if len(blocks) == 1:
        return next(iter(blocks))
    counts = [f"{words} in {count}" for words, count in blocks.items() if words != "nothing"]
    return "; ".join(counts) + f" of {blocks.total()} blocks"


def _rounded(tokens_per_second: float) -> str:
    """Round to three digits: more would promise too much."""
    digits = max(0, math.floor(math.log10(max(tokens_per_second, 1))) - 2)
    return f"{round(tokens_per_second / 10**digits) * 10**digits:,}"
