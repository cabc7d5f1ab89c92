"""Records of a training attempt: metrics, memory, and outcome or failure."""

from __future__ import annotations

import math
from datetime import UTC, datetime
from typing import Any

from pydantic import Field, model_validator

from qwen3ft.errors import FinetuneError
from qwen3ft.records.base import Record


class MemoryStatus(Record):
    """Memory of the training device: GPU memory, or the process's resident memory on a CPU."""

    allocated_gb: float = Field(description="In use by tensors (CPU: resident set).")
    cached_gb: float = Field(description="Held by the allocator (CPU: same as allocated).")
    total_gb: float = Field(description="The budget, or the device's total if that is smaller.")
    available_gb: float = Field(description="Left of total_gb, and free on the device.")
    is_safe: bool = Field(description="True while less than 90 % of total_gb is in use.")
    beside_gb: float = Field(0.0, description="CUDA context and libraries, beside the allocator.")


class TrainingMetrics(Record):
    """One line of metrics.jsonl: measurements of one optimizer step or evaluation."""

    epoch: float
    step: int = Field(description="Optimizer steps done since the start of the run.")
    loss: float | None = Field(None, description="Mean negative log-likelihood per trained token.")
    learning_rate: float
    memory_usage: MemoryStatus
    timestamp: datetime = Field(default_factory=lambda: datetime.now(UTC))
    grad_norm: float | None = None
    tokens_per_second: float | None = Field(None, description="Real tokens; padding not counted.")
    held_out_loss: float | None = Field(None, description="Set on evaluation lines only.")

    def seconds_left(self, total_steps: int, first: TrainingMetrics) -> float | None:
        """Return the time to step `total_steps` at the mean speed since `first`, if there is one.

        Evaluations in between count as part of the steps.
        """
        steps, seconds = self.step - first.step, (self.timestamp - first.timestamp).total_seconds()
        return max(0, total_steps - self.step) * seconds / steps if steps > 0 else None


class Failure(Record):
    """Error of `qwen3ft.errors` as a value: why a worker ended without an outcome."""

    kind: str
    what: str
    why: str = ""
    next_command: str = ""
    facts: dict[str, Any] = Field(default_factory=dict)

    @model_validator(mode="before")
    @classmethod
    def _drop_log_tail(cls, values: Any) -> Any:
        # records that older versions wrote have this field
        if isinstance(values, dict):
            return {name: value for name, value in values.items() if name != "log_tail"}
        return values

    @classmethod
    def from_error(cls, error: FinetuneError) -> Failure:
        """Record `error`; facts become JSON values, non-finite numbers and objects text."""
        return cls(**error.to_dict() | {"facts": _plain(error.facts)})

    def to_error(self) -> FinetuneError:
        """Rebuild the error."""
        return FinetuneError.from_dict(self.model_dump())


class RankOutcome(Record):
    """Result of a rank above 0 of a completed attempt."""

    peak_memory_gb: float = Field(description="Peak of the process, from NVML or as RSS.")
    exchange_ms: float = Field(0.0, description="Median time to sum gradients, waiting included.")
    computing_ms: float = Field(0.0, description="Median time between two such sums.")
    launch_bound_share: float = Field(
        0.0, description="Share of steps in which the GPU was done as soon as all was launched."
    )


class AttemptOutcome(Record):
    """Result of a completed attempt: its best checkpoint and its measurements."""

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
    peak_memory_gb: float = Field(description="Peak of the process, from NVML or as RSS.")
    peak_allocated_gb: float
    peak_reserved_gb: float
    tokens_per_second: float
    seconds: float
    rank_peaks_gb: tuple[float, ...] = Field(
        (), description="Peak of each rank's process; the highest is `peak_memory_gb`."
    )
    rank_exchange_ms: tuple[float, ...] = Field(
        (), description="Each rank's median time to sum gradients, waiting included."
    )
    rank_computing_ms: tuple[float, ...] = Field(
        (), description="Each rank's median time between two such sums; the longest is late."
    )
    rank_launch_bound_share: tuple[float, ...] = Field(
        (), description="Each rank's share of steps whose launches took longer than the GPU."
    )


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    return value if value is None or isinstance(value, (bool, int, float, str)) else str(value)
