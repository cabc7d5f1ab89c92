"""What a preflight says: the worst batches of a run, and their memory, predicted and measured.

Bytes of the device that trains; on a CPU all three kinds are the resident set.
"""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from qwen3ft.records.base import Record
from qwen3ft.records.plan import TrainPlan
from qwen3ft.records.training import Failure

Phase = Literal["load", "forward_backward", "optimizer", "evaluate", "save"]


class WorstBatch(Record):
    """One real micro-batch, or batch of an evaluation, that asks for more than the others."""

    chosen_for: tuple[str, ...] = Field(description="In which respect it is the worst.")
    rows: tuple[int, ...] = Field(description="Row numbers of its split, in order.")
    lengths: tuple[int, ...] = Field(description="Tokens of each.")
    slots: int = Field(description="Tokens as it is run, padding included.")


class WorstBatches(Record):
    """The worst of everything that a plan will put on the device."""

    train: tuple[WorstBatch, ...]
    evaluate: tuple[WorstBatch, ...] = Field(description="Whole batches before a shorter last one.")
    accumulates: bool = Field(description="Whether any step has more than one micro-batch.")
    steps_looked_at: int

    def steps(self) -> tuple[tuple[tuple[int, ...], ...], ...]:
        """Optimizer steps, each its micro-batches' rows, in which every one has its worst moment.

        From the second step on the optimizer has its state; from the second micro-batch of a step
        on there are gradients.
        """
        batches = tuple(batch.rows for batch in self.train)
        if not self.accumulates:
            return tuple((rows,) for rows in batches) * 2
        return (batches if len(batches) > 1 else batches * 2,) * 2


class PreflightRequest(Record):
    """What a preflight worker is asked to do."""

    plan: TrainPlan
    batches: WorstBatches
    number: int = Field(description="1 for the first plan, 2 for the one made after it.")


class PhaseMemory(Record):
    """Memory in one phase: peaks, and what was in use at its end."""

    phase: Phase
    allocated_bytes: int = Field(description="In use by tensors, at most.")
    reserved_bytes: int = Field(description="Held by the allocator, at most.")
    process_bytes: int = Field(description="Of the whole process since its start, at most.")
    resting_bytes: int = Field(description="In use by tensors when the phase ended last.")
    seconds: float


class Measurement(Record):
    """What a preflight worker measured."""

    device: str = Field(description="Name of the card, or 'cpu'.")
    before_bytes: int = Field(description="In use before the model was loaded.")
    adapter_bytes: int = Field(description="The parameters that are trained.")
    phases: tuple[PhaseMemory, ...]
    seconds: float

    def phase(self, name: Phase) -> PhaseMemory:
        """The phase of that name; KeyError if it did not take place."""
        for phase in self.phases:
            if phase.phase == name:
                return phase
        raise KeyError(name)


class PartComparison(Record):
    """One part of the peak."""

    name: str
    predicted_bytes: int
    measured_bytes: int | None = Field(description="None where it cannot be told from others.")


class PreflightReport(Record):
    """One measurement beside its prediction."""

    key: str = Field(description="Of everything that its memory depends on.")
    device: str
    budget_bytes: int
    predicted_bytes: int
    measured_bytes: int = Field(
        description="Peak of the process; where memory ran out, the least it would have been."
    )
    fitted: bool
    parts: tuple[PartComparison, ...]
    phases: tuple[PhaseMemory, ...] = Field(description="Those that were completed.")
    batches: WorstBatches
    seconds: float
    failure: Failure | None = Field(None, description="How memory ran out, if it did.")
    notes: tuple[str, ...] = ()
    from_cache: bool = False

    @property
    def relative_error(self) -> float:
        """(predicted - measured) / measured: negative where too little was predicted."""
        return self.predicted_bytes / self.measured_bytes - 1


class PreflightResult(Record):
    """The plan to train with, and what was measured on the way to it."""

    plan: TrainPlan
    reports: tuple[PreflightReport, ...] = ()
    skipped: str = Field("", description="Why nothing was measured, where nothing was.")
