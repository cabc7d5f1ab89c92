"""Results of a training attempt: its metrics, its memory, its outcome or its failure."""

from __future__ import annotations

from datetime import UTC, datetime
from typing import Any

from pydantic import Field

from qwen3ft.records.base import Record


class MemoryStatus(Record):
    """Memory of the device that trains: the GPU's, or this process's resident memory on a CPU."""

    allocated_gb: float = Field(description="In use by tensors (CPU: resident set).")
    cached_gb: float = Field(description="Held by the allocator (CPU: same as allocated).")
    total_gb: float = Field(description="The budget, or the device's total if that is smaller.")
    available_gb: float = Field(description="What is left of total_gb and free on the device.")
    is_safe: bool = Field(description="Whether use is below 90 % of total_gb.")
    beside_gb: float = Field(
        0.0, description="Of the process but not of the allocator: CUDA context, libraries' own."
    )


class TrainingMetrics(Record):
    """One line of metrics.jsonl: what one optimizer step (or one evaluation) measured."""

    epoch: float
    step: int = Field(description="Optimizer steps done since the start of the run.")
    loss: float | None = Field(None, description="Mean negative log-likelihood per trained token.")
    learning_rate: float
    memory_usage: MemoryStatus
    timestamp: datetime = Field(default_factory=lambda: datetime.now(UTC))
    grad_norm: float | None = None
    tokens_per_second: float | None = Field(None, description="Real tokens; padding not counted.")
    held_out_loss: float | None = Field(None, description="Set on evaluation lines only.")


class Failure(Record):
    """Why an attempt ended: an error of `qwen3ft.errors` as a value."""

    kind: str
    what: str
    why: str = ""
    next_command: str = ""
    facts: dict[str, Any] = Field(default_factory=dict)
    log_tail: str = ""


class AttemptOutcome(Record):
    """A completed attempt: which checkpoint is best, and what was measured."""

    attempt: int
    attempt_dir: str
    best_checkpoint: str
    best_step: int
    best_held_out_loss: float
    first_held_out_loss: float
    last_step: int
    epochs: float
    final_loss: float | None
    stopped_early: bool
    peak_memory_gb: float = Field(description="Highest of any attempt process, as NVML or RSS.")
    peak_allocated_gb: float
    peak_reserved_gb: float
    tokens_per_second: float
    seconds: float
