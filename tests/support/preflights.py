"""Batches and reports of preflights, made without a worker."""

from __future__ import annotations

from typing import Any

from qwen3ft.errors import OutOfMemoryError
from qwen3ft.preflight.report import (
    measured_report,
    out_of_memory_report,
)
from qwen3ft.records.plan import TrainPlan
from qwen3ft.records.preflight import (
    Measurement,
    PhaseMemory,
    PreflightReport,
    WorstBatch,
    WorstBatches,
)
from qwen3ft.units import GIB

BATCHES = WorstBatches(
    train=(WorstBatch(chosen_for=("most tokens",), rows=(3, 1), lengths=(9, 7), slots=18),),
    evaluate=(WorstBatch(chosen_for=("most tokens",), rows=(0,), lengths=(5,), slots=5),),
    accumulates=True,
    steps_looked_at=4,
)


def report_of(
    plan: TrainPlan, measured_share: float = 0.9, failure: OutOfMemoryError | None = None
) -> PreflightReport:
    """Return a report of a process that took a share of the budget, or ran out of memory."""
    if failure is not None:
        return out_of_memory_report("key", plan, BATCHES, failure, (), 3.0)
    peak = round(measured_share * plan.max_memory_gb * GIB)
    peaks = {"allocated_bytes": peak - 900, "reserved_bytes": peak - 500, "process_bytes": peak}
    phases = tuple(
        PhaseMemory(phase=name, resting_bytes=resting, seconds=1.0, **peaks)
        for name, resting in (("load", 1_100), ("forward_backward", 1_400))
    )
    measurement = Measurement(
        device="a GPU", before_bytes=10, adapter_bytes=100, phases=phases, seconds=2.0
    )
    return measured_report("key", plan, BATCHES, measurement)


def out_of_memory(**facts: Any) -> OutOfMemoryError:
    return OutOfMemoryError("CUDA out of memory.", **{"phase": "train", **facts})
