"""Run and measure a plan's worst batches in a worker, before training.

A plan that was measured before under the same conditions is not measured again. Only the plan
reaches training. A worker that fails for another reason than memory costs its time alone:
recovery of training deals with the reason, should it come back.
"""

from __future__ import annotations

import shutil
import time

from qwen3ft.config import TrainingConfig
from qwen3ft.errors import FinetuneError, OutOfMemoryError, RequestError
from qwen3ft.faults import planted_in_preflight
from qwen3ft.jobs.folders import RunDir
from qwen3ft.jobs.launcher import run_worker
from qwen3ft.logs import get_logger
from qwen3ft.machine.gpu_choice import only_visible
from qwen3ft.planning.answers import decoder_load
from qwen3ft.preflight.cache import keep_report, read_report, report_key
from qwen3ft.preflight.policy import decide_preflight, replan, too_little_memory
from qwen3ft.preflight.report import completed_phases, measured_report, out_of_memory_report
from qwen3ft.preflight.worst_batches import find_worst, read_lengths
from qwen3ft.records.machine import EnvironmentReport
from qwen3ft.records.plan import TrainPlan
from qwen3ft.records.preflight import (
    Measurement,
    PreflightReport,
    PreflightRequest,
    PreflightResult,
    WorstBatches,
)
from qwen3ft.recovery.shared_gpu import fit_to_free_memory
from qwen3ft.units import gb, size_text

logger = get_logger("preflight")

CLOSE_SHARE = 0.5
"""Share of the budget below which a prediction is not worth a worker's start on a CPU."""


def measure_first(
    config: TrainingConfig, environment: EnvironmentReport, plan: TrainPlan, run: RunDir
) -> PreflightResult:
    """Measure `plan`, and once more a lower one if it does not fit.

    Raises:
        InsufficientMemoryError: It does not fit, and there is nothing left to lower.
        RequestError: The worker's request cannot be met.
    """
    if why := why_skipped(config, plan):
        logger.info("preflight left out: %s", why)
        return PreflightResult(plan=plan, skipped=why)
    reports: list[PreflightReport] = []
    plan = fit_to_free_memory(config, environment, plan)
    while (report := _report_of(config, environment, plan, run, len(reports) + 1)) is not None:
        reports.append(report)
        decision = decide_preflight(
            plan, report, replanned=len(reports) > 1, allow_degraded=config.allow_degraded
        )
        logger.info("%s: %s", decision, _sentence(report))
        if decision == "stop":
            raise too_little_memory(report)
        if decision != "replan":
            return PreflightResult(plan=_with_measurement(plan, report), reports=tuple(reports))
        plan = replan(config, environment, plan, report)
    return PreflightResult(
        plan=plan, reports=tuple(reports), skipped="The worker failed; its log says why."
    )


def why_skipped(config: TrainingConfig, plan: TrainPlan) -> str:
    """Return why `plan` is not measured; empty if it is."""
    if config.preflight == "off":
        return "Configured as 'off'."
    if config.preflight == "on" or plan.device == "cuda":
        return ""
    predicted_gb = gb(plan.predicted_peak_bytes)
    if predicted_gb > CLOSE_SHARE * plan.max_memory_gb:
        return ""
    return (
        f"On a CPU {predicted_gb:.2f} GB predicted are far from the {plan.max_memory_gb:.2f} GB "
        "of the budget."
    )


def _report_of(
    config: TrainingConfig,
    environment: EnvironmentReport,
    plan: TrainPlan,
    run: RunDir,
    number: int,
) -> PreflightReport | None:
    """Return the report of `plan`, cached or measured now; None if the worker failed otherwise."""
    batches = find_worst(plan, *read_lengths(plan))
    key = report_key(plan, environment, batches, planted_in_preflight(number))
    if (kept := read_report(config, key)) is not None:
        return kept
    job = run.job(f"preflight-{number}")
    request = PreflightRequest(
        plan=shortened(plan, batches, run),
        batches=batches,
        number=number,
        answers=decoder_load(config, environment, plan),
    )
    job.create(request)
    # The first GPU of the run may be one that the plan leaves out.
    uuids = [environment.gpus[place].uuid for place in plan.places if environment.gpus]
    started = time.monotonic()
    try:
        with only_visible(uuids, environment.gpus):
            measurement = run_worker(
                "preflight", job, Measurement, stall_seconds=config.stall_seconds
            )
        report = measured_report(key, plan, batches, measurement)
    except RequestError:
        raise
    except OutOfMemoryError as error:
        seconds = time.monotonic() - started
        report = out_of_memory_report(key, plan, batches, error, completed_phases(job), seconds)
    except FinetuneError as error:
        logger.warning("the preflight failed, training goes on without: %s", error)
        return None
    finally:
        shutil.rmtree(job.checkpoints, ignore_errors=True)
    keep_report(config, environment, report)
    return report


def shortened(plan: TrainPlan, batches: WorstBatches, run: RunDir) -> TrainPlan:
    """Return `plan` for the steps of `batches` alone, with an evaluation and a checkpoint."""
    steps = len(batches.steps())
    schedule = {
        "total_steps": steps,
        "warmup_steps": min(plan.warmup_steps, steps),
        "evaluate_every_steps": steps,
    }
    given = plan.for_run(run.path.name, str(run.path), attempt=1, resume_from=None)
    return given.model_copy(update=schedule)


def _with_measurement(plan: TrainPlan, report: PreflightReport) -> TrainPlan:
    """Return `plan` with the measurement among its reasons."""
    reason = f"{plan.reasons['predicted']} {_sentence(report)}"
    return plan.model_copy(update={"reasons": plan.reasons | {"predicted": reason}})


def _sentence(report: PreflightReport) -> str:
    predicted = f"{size_text(report.predicted_bytes)} predicted"
    if report.failure is not None:
        return f"Memory ran out in the preflight, with {predicted}."
    return f"The preflight measured {size_text(report.measured_bytes)}, with {predicted}."
