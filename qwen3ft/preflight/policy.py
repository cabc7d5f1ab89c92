"""Decide what follows a preflight: train, plan once more, leave it to recovery, or stop.

    fits                                   train, however far the prediction was off
    over the budget, or out of memory      one new plan, as if the budget were smaller by what the
                                           prediction missed; measured again
    the same with the new plan             train: the ladder of `qwen3ft.recovery.adjust` takes over
    nothing left to lower, or no room for  InsufficientMemoryError
    the model alone

Pure. There is at most one new plan; it keeps the result and takes less memory than the first.
"""

from __future__ import annotations

from typing import Literal

from qwen3ft.config import TrainingConfig
from qwen3ft.errors import InsufficientMemoryError
from qwen3ft.planning.plan import build_plan, repredict
from qwen3ft.records.machine import EnvironmentReport
from qwen3ft.records.plan import TrainPlan
from qwen3ft.records.preflight import PreflightReport
from qwen3ft.recovery.ladder import EVALUATION_PHASE, next_rungs, without_host_memory
from qwen3ft.units import gb, size_text

Decision = Literal["train", "replan", "recover", "stop"]

LOAD_PHASE = "load"


def decide_preflight(
    plan: TrainPlan, report: PreflightReport, *, replanned: bool, allow_degraded: bool
) -> Decision:
    """Return what to do with `plan` after its preflight.

    Args:
        plan: The plan that was measured.
        report: The measurement.
        replanned: Whether `plan` was made because of an earlier measurement.
        allow_degraded: Whether recovery may change the result.
    """
    if report.fitted:
        return "train"
    if _phase(report) == LOAD_PHASE:
        return "stop"  # no setting that could be lowered has played a part yet
    if _host_memory_beside_a_gpu(plan, report):
        return "recover" if replanned or without_host_memory(plan) is None else "replan"
    if not next_rungs(plan, _phase(report), allow_degraded=replanned and allow_degraded):
        return "recover" if not replanned and allow_degraded else "stop"
    return "recover" if replanned else "replan"


def corrected_budget_gb(report: PreflightReport) -> float:
    """Return the budget less what the prediction missed, so that the real peak fits the budget."""
    missed_bytes = report.measured_bytes - report.predicted_bytes
    return gb(report.budget_bytes - missed_bytes)


def replan(
    config: TrainingConfig, environment: EnvironmentReport, plan: TrainPlan, report: PreflightReport
) -> TrainPlan:
    """Return the plan to take instead of `plan`, within the same budget."""
    lower = _lower(config, environment, plan, report)
    measured = (
        f"The preflight of the first plan measured {size_text(report.measured_bytes)}"
        if report.failure is None
        else "The preflight of the first plan ran out of memory"
    )
    why = f"{plan.reasons['max_memory_gb']} {measured} where {gb(report.predicted_bytes):.2f} "
    return lower.model_copy(
        update={
            "max_memory_gb": plan.max_memory_gb,
            "reasons": lower.reasons | {"max_memory_gb": why + "GB were predicted."},
        }
    )


def too_little_memory(report: PreflightReport) -> InsufficientMemoryError:
    """Return the error that ends the run where nothing is left to lower."""
    measured_gb, budget_gb = gb(report.measured_bytes), gb(report.budget_bytes)
    rows = "\n".join(
        f"  {part.name:<32}{gb(part.predicted_bytes):8.3f} GB predicted"
        + (f"{gb(part.measured_bytes):10.3f} measured" if part.measured_bytes is not None else "")
        for part in report.parts
    )
    what = (
        f"{measured_gb:.2f} GB were measured"
        if report.failure is None
        else f"memory ran out while the model was {_verb(_phase(report))}"
    )
    return InsufficientMemoryError(
        f"In the preflight {what}, the budget is {budget_gb:.2f} GB, and nothing is left to "
        f"lower:\n{rows}",
        why=report.failure.what
        if report.failure
        else f"{size_text(report.predicted_bytes)} were predicted for the most frugal settings.",
        next_command=f"qwen3ft plan --set max_memory_gb={measured_gb * 1.05:.1f}",
        need_gb=round(measured_gb, 2),
        have_gb=round(budget_gb, 2),
        phase=_phase(report),
    )


def _lower(
    config: TrainingConfig, environment: EnvironmentReport, plan: TrainPlan, report: PreflightReport
) -> TrainPlan:
    """Return the plan for the corrected budget; where nothing fits it, all rungs of the ladder."""
    if _host_memory_beside_a_gpu(plan, report):
        rung = without_host_memory(plan)
        return repredict(plan.with_settings(**rung.values)) if rung else plan
    rungs = next_rungs(plan, _phase(report), allow_degraded=False)
    if _phase(report) == EVALUATION_PHASE and "eval_batch_size" in rungs[0].values:
        return repredict(plan.with_settings(**rungs[0].values))  # training itself fits
    if (budget_gb := corrected_budget_gb(report)) > 0:
        smaller = config.model_copy(update={"max_memory_gb": budget_gb})
        try:
            return build_plan(smaller, environment, plan.model, plan.adapter, plan.dataset)
        except InsufficientMemoryError:
            pass  # what was measured may fit all the same
    values = {name: value for rung in rungs for name, value in rung.values.items()}
    return repredict(plan.with_settings(**values))


def _phase(report: PreflightReport) -> str:
    return str(report.failure.facts.get("phase", "")) if report.failure else ""


def _verb(phase: str) -> str:
    return {LOAD_PHASE: "loaded", EVALUATION_PHASE: "evaluated"}.get(phase, "trained")


def _host_memory_beside_a_gpu(plan: TrainPlan, report: PreflightReport) -> bool:
    domain = report.failure.facts.get("domain") if report.failure else None
    return plan.device == "cuda" and domain == "host"
