"""The attempts of a run, read from its folder: how each ended, what changed next, and why.

The folder knows the attempts of a resumed run from before, and those of a process that was killed.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from qwen3ft.jobs.folders import JobDir, RunDir, read_record, read_records
from qwen3ft.records.plan import TrainPlan
from qwen3ft.records.run_card import AttemptSummary, LossCurve, SettingChange
from qwen3ft.records.training import Failure, TrainingMetrics
from qwen3ft.report.charts import loss_curve
from qwen3ft.report.figures import AttemptMemory
from qwen3ft.units import size_text

INTERRUPTED = "interrupted"
"""Outcome of an attempt that left neither a result nor a failure: its process was killed."""

CHANGED_NAMES = {
    "max_memory_gb": "budget",
    "places": "ranks",
    "gradient_checkpointing": "recomputation",
    "activation_bytes": "kept activations per row",
    "loss_chunk_tokens": "tokens per loss chunk",
    "chunk_tokens": "tokens per chunk of a block",
    "offload_activations": "activations in host memory",
    "offload_attention": "attention output in host memory",
    "offloaded_mlp_blocks": "blocks with MLP activations in host memory",
    "offload_optimizer": "optimizer in host memory",
    "graphs": "CUDA graphs",
    "head_groups": "head groups of the attention backward pass",
    "eval_batch_size": "evaluation batch",
    "max_sequence_length": "longest row in tokens",
    "learning_rate": "learning rate",
    "kernels": "kernels",
    "packing": "packing",
}
"""{plan field: its name for people}; batch and rank are compared separately."""


def summarise(
    plan: TrainPlan, failure: Failure | None, seconds: float, before: TrainPlan | None = None
) -> AttemptSummary:
    """Summarise the attempt of `plan`, which followed the attempt of `before`."""
    return AttemptSummary(
        attempt=plan.attempt,
        outcome=failure.kind if failure else "completed",
        detail=failure.what if failure else "best checkpoint kept",
        micro_batch_size=plan.memory.micro_batch_size,
        gradient_accumulation_steps=plan.gradient_accumulation_steps,
        gradient_checkpointing=plan.memory.gradient_checkpointing,
        learning_rate=plan.learning_rate,
        resumed_from_step=resumed_step(plan),
        seconds=seconds,
        changes=changes(before, plan) if before else (),
    )


def resumed_step(plan: TrainPlan) -> int | None:
    """Return the step of the checkpoint that the plan resumes from; None without one."""
    return int(Path(plan.resume_from).name.removeprefix("step-")) if plan.resume_from else None


def changes(before: TrainPlan, after: TrainPlan) -> tuple[SettingChange, ...]:
    """Return the settings in which the plan `after` differs from `before`, with the reasons."""
    found = []
    if _batch(before) != _batch(after):
        found.append(("batch", _batch(before), _batch(after), "micro_batch_size"))
    for field, name in CHANGED_NAMES.items():
        old, new = before.setting(field), after.setting(field)
        if old != new:
            found.append((name, _readable(field, old), _readable(field, new), field))
    if before.adapter.r != after.adapter.r:
        found.append(("rank", str(before.adapter.r), str(after.adapter.r), "adapter"))
    return tuple(
        SettingChange(name=name, before=old, after=new, why=after.reasons.get(field, ""))
        for name, old, new, field in found
    )


def changes_text(summary: AttemptSummary, previous: AttemptSummary | None) -> str:
    """Describe the changes: `batch 16 x 1 → 8 x 2; from the checkpoint of step 40`."""
    parts = [f"{change.name} {change.before} → {change.after}" for change in summary.changes]
    if previous is not None and not parts:
        parts.append("the same settings, a fresh process")
    if summary.resumed_from_step is not None:
        parts.append(f"from the checkpoint of step {summary.resumed_from_step:,}")
    elif previous is not None:
        parts.append("from the start")
    return "; ".join(parts) or "as planned"


def reasons_text(summary: AttemptSummary) -> str:
    """Return the reasons for the changes, each once."""
    return " ".join(dict.fromkeys(change.why for change in summary.changes if change.why))


def kind_text(kind: str) -> str:
    """Return the name of an error in plain words: `OutOfMemoryError` is `out of memory`."""
    return re.sub(r"(?<!^)(?=[A-Z])", " ", kind.removesuffix("Error")).lower()


def attempt_rows(attempts: Sequence[AttemptSummary]) -> list[dict[str, Any]]:
    """Return the table of attempts, one {column: value} for each."""
    return [
        {
            "attempt": attempt.attempt,
            "what changed": changes_text(attempt, before),
            "why": reasons_text(attempt),
            "outcome": kind_text(attempt.outcome),
            "detail": attempt.detail,
            "batch": f"{attempt.micro_batch_size} x {attempt.gradient_accumulation_steps}",
            "learning rate": attempt.learning_rate,
            "seconds": round(attempt.seconds, 1),
        }
        for before, attempt in zip((None, *attempts), attempts, strict=False)
    ]


def read_attempts(run: RunDir, memory: Sequence[AttemptMemory]) -> tuple[AttemptSummary, ...]:
    """Read every attempt of the run's folder, in order.

    Args:
        run: The folder.
        memory: From `attempts_memory`: the times at which each began and ended.
    """
    found: list[AttemptSummary] = []
    before = None
    spans = {attempt.number: attempt for attempt in memory}
    for job in run.attempts():
        plan = _plan_of(job)
        if plan is None:
            continue
        span = spans.get(plan.attempt)
        found.append(summarise(plan, _failure(job), span.seconds if span else 0.0, before))
        before = plan
    return tuple(found)


def read_loss_curves(run: RunDir) -> tuple[LossCurve, ...]:
    """Read the losses of every attempt; a step that was repeated is in the last one's only."""
    curves = [loss_curve(number, lines) for number, lines in read_run_metrics(run).items()]
    return tuple(curve for curve in curves if curve.training or curve.held_out)


def read_run_metrics(run: RunDir) -> dict[int, list[TrainingMetrics]]:
    """Read the metrics of each attempt up to where a later one resumed; {attempt: its lines}.

    So each step of the run is there once. An unreadable line costs only itself.
    """
    kept: dict[int, list[TrainingMetrics]] = {}
    until, evaluated = math.inf, False
    for job in reversed(run.attempts()):
        plan = _plan_of(job)
        lines = read_records(job.metrics, TrainingMetrics)
        kept[int(job.path.name)] = [
            line
            for line in lines
            if line.step < until
            or (line.step == until and not (evaluated and line.held_out_loss is not None))
        ]
        if plan is None or not lines:
            continue  # it never got to its first step
        start = resumed_step(plan) or 0
        if start < until:
            until, evaluated = start, False
        evaluated |= any(line.step == until and line.held_out_loss is not None for line in lines)
    return dict(reversed(kept.items()))


def _plan_of(job: JobDir) -> TrainPlan | None:
    try:
        return read_record(job.request, TrainPlan)
    except (OSError, ValueError):
        return None


def _failure(job: JobDir) -> Failure | None:
    if job.outcome.exists():
        return None
    interrupted = Failure(kind=INTERRUPTED, what="the process of the run was killed")
    return job.read_failure() or interrupted


def _batch(plan: TrainPlan) -> str:
    return f"{plan.memory.micro_batch_size} x {plan.gradient_accumulation_steps}"


def _readable(field: str, value: object) -> str:
    if isinstance(value, bool):
        return "on" if value else "off"
    if isinstance(value, tuple):
        return str(len(value))
    if field == "activation_bytes" and isinstance(value, int):
        return size_text(value)
    if field == "max_memory_gb":
        return f"{value:g} GB"
    return f"{value:g}" if isinstance(value, float) else str(value)
