"""Fit each attempt to the memory that other programs leave free on its GPUs.

Where less than the budget is free but something fits, the attempt is planned again within that,
with the same effective batch and the same result. Where nothing fits, the run waits or refuses, as
`when_gpu_is_busy` says, and names the programs. A budget once lowered stays so for the run.

Of several ranks, those whose GPU is gone or filled are left out, and the rest goes on. Another host
looks at its own GPUs when it joins.

Not covered: memory that other programs take once the attempt runs, which ends it with an error that
recovery answers; and corrections by a preflight or by recovery, which a new plan forgets.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable

from qwen3ft.config import TrainingConfig
from qwen3ft.errors import EnvironmentNotReadyError, InsufficientMemoryError
from qwen3ft.logs import get_logger
from qwen3ft.machine.gpus import gpu_use
from qwen3ft.planning.plan import build_plan, repredict
from qwen3ft.records.machine import EnvironmentReport, GpuUse
from qwen3ft.records.plan import TrainPlan
from qwen3ft.units import GIB, gb, size_text

logger = get_logger("card")

MARGIN_BYTES = int(0.25 * GIB)
"""Free memory left to other programs, whose use is never quite steady."""

SETTLE_SECONDS = 5.0
"""Time that memory may take to come back: a process that just ended frees it late."""

_POLL_SECONDS = 1.0
_REPORT_SECONDS = 30.0

KEPT_SETTINGS = (
    *("attempt", "run_id", "run_dir", "resume_from", "degraded", "learning_rate", "places"),
    *("places_per_host", "total_steps", "warmup_steps", "evaluate_every_steps"),
)
"""Settings that a new plan takes over: its place in the run, and what attempts changed."""


def fit_to_free_memory(
    config: TrainingConfig,
    environment: EnvironmentReport,
    plan: TrainPlan,
    *,
    probe: Callable[[str], GpuUse] = gpu_use,
    settle_seconds: float = SETTLE_SECONDS,
) -> TrainPlan:
    """Return `plan` if its budget is free on the GPU, else a plan within what is free.

    Args:
        config: The settings the plan was made from, and what to do while nothing fits.
        environment: The machine with its GPU; on a CPU `plan` is returned as it is.
        plan: The attempt about to begin.
        probe: Reads the use of the GPU with a UUID.
        settle_seconds: Time that memory may take to come back before it counts as taken.

    Raises:
        EnvironmentNotReadyError: Too little is free, for as long as the run may wait.
    """
    if plan.device == "cpu":
        return plan
    if plan.ranks > 1:
        plan = _on_usable_gpus(environment, plan, probe, settle_seconds)
    uuids = [environment.gpus[place].uuid for place in plan.places_on(0)]

    def look() -> GpuUse:  # the ranks have one plan, so the fullest of their GPUs decides
        return min(map(probe, uuids), key=lambda use: use.free_bytes)

    started, reports = time.monotonic(), 0
    use = look()
    fitted = fit_within(config, environment, plan, use)
    while True:
        if fitted is plan:
            return plan
        waited = time.monotonic() - started
        if waited >= settle_seconds:
            if fitted is not None:
                logger.warning("less is planned for: %s", fitted.reasons["max_memory_gb"])
                return fitted
            left = config.wait_for_gpu_seconds - waited
            if config.when_gpu_is_busy == "refuse" or left <= 0:
                raise _too_full(config, plan, use, waited)
            if waited >= reports * _REPORT_SECONDS:
                reports += 1
                logger.info("%s; waiting, at most %.0f s more", _shortage(plan, use), left)
        time.sleep(_POLL_SECONDS)
        before, use = use, look()
        if use != before:  # planning again takes longer than a look at the GPU
            fitted = fit_within(config, environment, plan, use)


def _on_usable_gpus(
    environment: EnvironmentReport,
    plan: TrainPlan,
    probe: Callable[[str], GpuUse],
    settle_seconds: float,
) -> TrainPlan:
    """Return `plan` without the ranks whose GPU is gone or filled, if any other can go on."""
    end = time.monotonic() + settle_seconds
    while True:
        lost = {
            place: why
            for place in plan.places_on(0)
            if (why := _flaw(environment, plan, place, probe))
        }
        if not lost or time.monotonic() >= end:
            break
        time.sleep(_POLL_SECONDS)
    left = tuple(place for place in plan.places if place not in lost)
    if not lost or len(lost) == len(plan.places_on(0)):
        return plan
    reason = f"{len(left)} of {plan.ranks} ranks go on: {'; '.join(lost.values())}."
    logger.warning("%s", reason)
    return repredict(plan.with_settings(places=left, reasons=plan.reasons | {"places": reason}))


def _flaw(
    environment: EnvironmentReport,
    plan: TrainPlan,
    place: int,
    probe: Callable[[str], GpuUse],
) -> str:
    """Return why a rank cannot run at a place; empty if it can."""
    gpu = environment.gpus[place]
    try:
        use = probe(gpu.uuid)
    except EnvironmentNotReadyError as error:
        return f"GPU {gpu.index} ({gpu.name}) is gone, {error.what}"
    if use.free_bytes >= plan.predicted_peak_bytes:
        return ""
    return f"GPU {gpu.index} ({gpu.name}) has {size_text(use.free_bytes)} free, {use.describe()}"


def fit_within(
    config: TrainingConfig, environment: EnvironmentReport, plan: TrainPlan, use: GpuUse
) -> TrainPlan | None:
    """Return `plan` if its budget is free, else one within what is free; None if nothing fits."""
    if use.free_bytes >= plan.max_memory_gb * GIB:
        return plan
    # Rounded down: the next hundredth of a GB may not be free.
    budget_gb = max(0, math.floor(gb(use.free_bytes - MARGIN_BYTES) * 100)) / 100
    reason = f"{budget_gb:g} of {plan.max_memory_gb:g} GB: {use.describe()}."
    if plan.predicted_peak_bytes <= budget_gb * GIB:
        reasons = plan.reasons | {"max_memory_gb": reason}
        return plan.model_copy(update={"max_memory_gb": budget_gb, "reasons": reasons})
    # Rows may be shorter than configured: recovery does that, with consent. Ranks may be fewer.
    wanted = {
        "max_memory_gb": budget_gb,
        "max_sequence_length": plan.max_sequence_length,
        "gpus": str(len(plan.places_on(0))),
        "hosts": len(plan.hosts),
    }
    smaller = config.model_copy(update=wanted)
    try:
        again = build_plan(smaller, environment, plan.model, plan.adapter, plan.dataset)
    except InsufficientMemoryError:
        return None
    kept = {name: getattr(plan, name) for name in KEPT_SETTINGS}
    why = {name: plan.reasons[name] for name in KEPT_SETTINGS if name in plan.reasons}
    reasons = again.reasons | why | {"max_memory_gb": reason}
    return again.model_copy(update=kept | {"reasons": reasons})


def _shortage(plan: TrainPlan, use: GpuUse) -> str:
    return (
        f"{gb(use.free_bytes):.2f} of {size_text(use.total_bytes)} are free, in which "
        f"nothing fits (the plan needs {gb(plan.predicted_peak_bytes):.2f}): {use.describe()}"
    )


def _too_full(
    config: TrainingConfig, plan: TrainPlan, use: GpuUse, waited: float
) -> EnvironmentNotReadyError:
    if config.when_gpu_is_busy == "refuse":
        why = "Other programs have the memory, and when_gpu_is_busy is 'refuse'."
        command = "qwen3ft run --set when_gpu_is_busy=wait"
    else:
        why = f"They did not free it within {waited:.0f} s; wait_for_gpu_seconds allows no more."
        pids = ",".join(str(process.pid) for process in use.processes)
        command = f"ps -fp {pids}" if pids else "nvidia-smi"
    return EnvironmentNotReadyError(
        f"{_shortage(plan, use)}.",
        why=why,
        next_command=command,
        free_bytes=use.free_bytes,
        needed_bytes=plan.predicted_peak_bytes,
        processes=[process.model_dump(mode="json") for process in use.processes],
    )
