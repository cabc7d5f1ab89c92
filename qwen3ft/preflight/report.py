"""Compare a preflight's measurement with its prediction, part by part, and show both.

Parts that cannot be told apart are left open, not guessed: a CPU's resident set is one number.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import get_args

from qwen3ft.disk.files import read_json_lines
from qwen3ft.errors import OutOfMemoryError
from qwen3ft.jobs.folders import JobDir
from qwen3ft.records.plan import TrainPlan
from qwen3ft.records.preflight import (
    AnswersMeasured,
    Measurement,
    PartComparison,
    Phase,
    PhaseMemory,
    PreflightReport,
    WorstBatches,
)
from qwen3ft.records.training import Failure
from qwen3ft.units import GIB, gb, size_text

WEIGHTS, STATE, ACTIVATIONS = "weights", "adapter, gradients, optimizer", "activations"
ALLOCATOR, CONTEXT = "allocator slack", "context and libraries"

GROUPS: Mapping[str, str] = {
    "4-bit weights": WEIGHTS,
    "quantisation constants": WEIGHTS,
    "embeddings and norms": WEIGHTS,
    "adapter": STATE,
    "gradients": STATE,
    "AdamW state": STATE,
    "gradients of other ranks": STATE,
    "NCCL": STATE,  # a tensor stands in for it
    "allocator slack": ALLOCATOR,
    "process": CONTEXT,
}
"""Measured part that each predicted part belongs to; all others belong to the activations."""

LEAST_SHORTFALL_SHARE = 0.1
"""Share of the budget that a plan that ran out of memory is assumed to lack at least."""


def measured_report(
    key: str, plan: TrainPlan, batches: WorstBatches, measurement: Measurement
) -> PreflightReport:
    """Return the report of a worker that finished."""
    measured_bytes = max(phase.process_bytes for phase in measurement.phases)
    budget_bytes = round(plan.max_memory_gb * GIB)
    report = PreflightReport(
        key=key,
        device=measurement.device,
        budget_bytes=budget_bytes,
        predicted_bytes=plan.predicted_peak_bytes,
        measured_bytes=measured_bytes,
        fitted=measured_bytes <= budget_bytes,
        parts=_compare(plan, _measured_parts(plan, measurement)),
        phases=measurement.phases,
        batches=batches,
        seconds=measurement.seconds,
        answers=measurement.answers,
    )
    return report.model_copy(update={"notes": _notes(plan, report)})


def out_of_memory_report(
    key: str,
    plan: TrainPlan,
    batches: WorstBatches,
    error: OutOfMemoryError,
    phases: tuple[PhaseMemory, ...],
    seconds: float,
) -> PreflightReport:
    """Return the report of a worker that ran out of memory."""
    # What it would have needed is unknown: at least the budget and the allocation that failed.
    budget_bytes = round(plan.max_memory_gb * GIB)
    tried_bytes = round(float(error.facts.get("tried_gb", 0.0)) * GIB)
    lacking_bytes = max(tried_bytes, round(LEAST_SHORTFALL_SHARE * budget_bytes))
    return PreflightReport(
        key=key,
        device=plan.device,
        budget_bytes=budget_bytes,
        predicted_bytes=plan.predicted_peak_bytes,
        measured_bytes=budget_bytes + lacking_bytes,
        fitted=False,
        parts=_compare(plan, {}),
        phases=phases,
        batches=batches,
        seconds=seconds,
        failure=Failure.from_error(error),
        notes=(f"Memory ran out: {error.what}",),
    )


def phases_path(job: JobDir) -> Path:
    """Return where a preflight's phases are written."""
    return job.path / "phases.jsonl"


def completed_phases(job: JobDir) -> tuple[PhaseMemory, ...]:
    """Return the phases a worker completed, in order; of repeated ones peaks and total time."""
    lines = read_json_lines(phases_path(job))
    found = [PhaseMemory.model_validate(line) for line in lines]
    named = ([each for each in found if each.phase == name] for name in get_args(Phase))
    return tuple(_together(each) for each in named if each)


def _together(phases: Sequence[PhaseMemory]) -> PhaseMemory:
    return PhaseMemory(
        phase=phases[0].phase,
        allocated_bytes=max(phase.allocated_bytes for phase in phases),
        reserved_bytes=max(phase.reserved_bytes for phase in phases),
        process_bytes=max(phase.process_bytes for phase in phases),
        resting_bytes=phases[-1].resting_bytes,
        seconds=sum(phase.seconds for phase in phases),
    )


def _compare(plan: TrainPlan, measured: Mapping[str, int]) -> tuple[PartComparison, ...]:
    predicted = dict.fromkeys((WEIGHTS, STATE, ACTIVATIONS, ALLOCATOR, CONTEXT), 0)
    for part in plan.predicted:
        predicted[GROUPS.get(part.name, ACTIVATIONS)] += part.bytes
    return tuple(
        PartComparison(name=name, predicted_bytes=size, measured_bytes=measured.get(name))
        for name, size in predicted.items()
    )


def _measured_parts(plan: TrainPlan, measurement: Measurement) -> dict[str, int]:
    """Return the parts that can be told apart; on a GPU they add up to the process's peak."""
    weights = measurement.phase("load").resting_bytes - measurement.adapter_bytes
    if plan.device == "cpu":
        weights = max(0, weights - measurement.before_bytes)
        return {WEIGHTS: weights, CONTEXT: measurement.before_bytes}
    reserved = max(phase.reserved_bytes for phase in measurement.phases)
    process = max(phase.process_bytes for phase in measurement.phases)
    apart = {WEIGHTS: weights, CONTEXT: process - reserved}
    if plan.memory.graphs:
        # Their pool counts as allocated while it is recorded alone, and what passes into and out of
        # them rests with the gradients.
        return apart
    # When the micro-batches of a step are done, gradients are complete and activations are gone.
    state = measurement.phase("forward_backward").resting_bytes - weights
    allocated = max(phase.allocated_bytes for phase in measurement.phases)
    return apart | {
        STATE: state,
        ACTIVATIONS: allocated - weights - state,
        ALLOCATOR: reserved - allocated,
    }


WORTH_A_NOTE_SHARE = 0.05
"""Relative error of a prediction from which the report points it out."""

UNUSED_SHARE = 0.15
"""Share of the budget that may stay unused without a note."""


def _notes(plan: TrainPlan, report: PreflightReport) -> tuple[str, ...]:
    notes = []
    if abs(report.relative_error) > WORTH_A_NOTE_SHARE:
        notes.append(f"The prediction was off by {report.relative_error:+.1%}.")
    unused_bytes = report.budget_bytes - report.measured_bytes
    frugal = plan.memory.gradient_checkpointing or plan.gradient_accumulation_steps > 1
    if unused_bytes > UNUSED_SHARE * report.budget_bytes and frugal:
        notes.append(
            f"{size_text(unused_bytes)} of the budget stay unused, while the plan "
            + ("recomputes" if plan.memory.gradient_checkpointing else "accumulates")
            + " to save memory: it is kept."
        )
    return tuple(notes)


def preflight_markdown(reports: Sequence[PreflightReport]) -> str:
    """Return all measurements of a run as Markdown, the last first."""
    return "\n".join(line for report in reversed(reports) for line in _markdown_of(report))


def _markdown_of(report: PreflightReport) -> list[str]:
    budget_gb = gb(report.budget_bytes)
    measured = (
        f"{gb(report.measured_bytes):.2f} of {budget_gb:.2f} GB measured"
        if report.failure is None
        else f"more than the {budget_gb:.2f} GB of the budget are needed"
    )
    source = ", by an earlier run" if report.from_cache else ""
    predicted = f"{size_text(report.predicted_bytes)} predicted"
    where = f"{report.device}, {report.seconds:.0f} s{source}"
    lines = [
        f"# Preflight: {'fits' if report.fitted else 'does not fit'}",
        "",
        f"**{measured}**, {predicted} ({where}).",
        "",
        *(f"> {note}\n" for note in report.notes),
        "| part | predicted GB | measured GB |",
        "|---|---|---|",
    ]
    lines += [
        f"| {part.name} | {gb(part.predicted_bytes):.3f} | {_gb(part.measured_bytes)} |"
        for part in report.parts
    ]
    peak_bytes = None if report.failure else report.measured_bytes
    lines.append(f"| in all | {gb(report.predicted_bytes):.3f} | {_gb(peak_bytes)} |")
    lines += [
        "",
        "| phase | tensors GB | allocator GB | process GB | seconds |",
        "|---|---|---|---|---|",
    ]
    lines += [
        f"| {phase.phase.replace('_', ' and ')} | {gb(phase.allocated_bytes):.3f} "
        f"| {gb(phase.reserved_bytes):.3f} | {gb(phase.process_bytes):.3f} "
        f"| {phase.seconds:.1f} |"
        for phase in report.phases
    ]
    if report.answers is not None:
        lines += ["", f"Answers by {_answers_text(report.answers)}."]
    lines += ["", "| batch | worst in | sequences | tokens | longest |", "|---|---|---|---|---|"]
    lines += [
        f"| {kind} | {', '.join(batch.chosen_for)} | {len(batch.rows)} | {batch.slots:,} "
        f"| {max(batch.lengths):,} |"
        for kind, batches in (
            ("micro-batch", report.batches.train),
            ("evaluation", report.batches.evaluate),
        )
        for batch in batches
    ]
    return [*lines, ""]


def _answers_text(answers: AnswersMeasured) -> str:
    if answers.measured_bytes is None or answers.step_seconds is None:
        return answers.by
    return (
        f"{answers.by}: {_gb(answers.measured_bytes)} GB measured, "
        f"{_gb(answers.predicted_bytes)} predicted, {1000 * answers.step_seconds:.1f} ms a step"
    )


def _gb(size: int | None) -> str:
    return "" if size is None else f"{gb(size):.3f}"
