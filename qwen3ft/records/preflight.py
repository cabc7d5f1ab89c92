"""Preflight: the worst batches of a run, and their memory, predicted and measured.

Memory is that of the device that trains; on a CPU all three kinds are the resident set.
"""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field

from qwen3ft.records.base import Record
from qwen3ft.records.plan import TrainPlan
from qwen3ft.records.training import Failure

Phase = Literal["load", "forward_backward", "optimizer", "evaluate", "save"]


class WorstBatch(Record):
    """Real micro-batch, or batch of an evaluation, that takes more memory than the others."""

    chosen_for: tuple[str, ...] = Field(description="Respects in which it is the worst.")
    rows: tuple[int, ...] = Field(description="Row numbers in its split, in order.")
    lengths: tuple[int, ...] = Field(description="Tokens of each row.")
    slots: int = Field(description="Tokens as it is run, padding included.")


class WorstBatches(Record):
    """Worst batches of everything that a plan will put on the device."""

    train: tuple[WorstBatch, ...]
    evaluate: tuple[WorstBatch, ...] = Field(description="Whole batches before a shorter last one.")
    accumulates: bool = Field(description="True if any step has more than one micro-batch.")
    steps_looked_at: int

    def steps(self) -> tuple[tuple[tuple[int, ...], ...], ...]:
        """Return optimizer steps in which every batch has its worst moment: micro-batches' rows."""
        # The optimizer has its state from the second step on, and gradients exist from the second
        # micro-batch of a step on.
        batches = tuple(batch.rows for batch in self.train)
        if not self.accumulates:
            return tuple((rows,) for rows in batches) * 2
        return (batches if len(batches) > 1 else batches * 2,) * 2


class PreflightRequest(Record):
    """Request to a preflight worker."""

    plan: TrainPlan
    batches: WorstBatches
    number: int = Field(description="1 for the first plan, 2 for the one made after it.")
    answers: dict[str, Any] | None = None
    """Fields of the `AnswerLoad` of the inference test without the shape, if the decoder is to
    answer."""


class PhaseMemory(Record):
    """Memory in one phase: peaks, and the use at its end."""

    phase: Phase
    allocated_bytes: int = Field(description="Peak in use by tensors.")
    reserved_bytes: int = Field(description="Peak held by the allocator.")
    process_bytes: int = Field(description="Peak of the whole process since its start.")
    resting_bytes: int = Field(description="In use by tensors when the phase ended last.")
    seconds: float


class AnswersMeasured(Record):
    """The decoder of the inference test, made and filled once."""

    by: str = Field(description="Its sizes, or why it was not measured.")
    predicted_bytes: int | None = None
    measured_bytes: int | None = Field(None, description="Peak of the process meanwhile.")
    step_seconds: float | None = None
    seconds: float = 0.0


class Measurement(Record):
    """Measurement of a preflight worker."""

    device: str = Field(description="Name of the GPU, or 'cpu'.")
    before_bytes: int = Field(description="In use before the model was loaded.")
    adapter_bytes: int = Field(description="Bytes of the parameters that are trained.")
    phases: tuple[PhaseMemory, ...]
    seconds: float
    answers: AnswersMeasured | None = None

    def phase(self, name: Phase) -> PhaseMemory:
        """Return the phase of that name; KeyError if it did not take place."""
        for phase in self.phases:
            if phase.phase == name:
                return phase
        raise KeyError(name)


class PartComparison(Record):
    """Part of the peak, predicted and measured."""

    name: str
    predicted_bytes: int
    measured_bytes: int | None = Field(description="None where it cannot be told from others.")


class PreflightReport(Record):
    """Measurement beside its prediction."""

    key: str = Field(description="Hash of everything that the memory depends on.")
    device: str
    budget_bytes: int
    predicted_bytes: int
    measured_bytes: int
    """Peak of the process; where memory ran out, the least it would have been."""
    fitted: bool
    parts: tuple[PartComparison, ...]
    phases: tuple[PhaseMemory, ...] = Field(description="Phases that were completed.")
    batches: WorstBatches
    seconds: float
    failure: Failure | None = Field(None, description="Set where memory ran out.")
    answers: AnswersMeasured | None = None
    notes: tuple[str, ...] = ()
    from_cache: bool = False

    @property
    def relative_error(self) -> float:
        """(predicted - measured) / measured: negative where too little was predicted."""
        return self.predicted_bytes / self.measured_bytes - 1


class PreflightResult(Record):
    """Plan to train with, and the measurements that led to it."""

    plan: TrainPlan
    reports: tuple[PreflightReport, ...] = ()
    skipped: str = Field("", description="Reason that nothing was measured, if so.")
