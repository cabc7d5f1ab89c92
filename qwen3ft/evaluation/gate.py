"""What the gate asks of a new adapter: every limit in one record."""

from __future__ import annotations

from pydantic import Field

from qwen3ft.config import TrainingConfig
from qwen3ft.records.base import Record


class GatePolicy(Record):
    """Limits of the gate; shares from 0 to 1."""

    confidence: float = Field(0.95, description="Of the interval that has to be above zero.")
    min_rows: int = Field(30, description="Fewer held-out questions prove nothing.")
    max_score_loss: float = Field(
        0.02, description="By how much a score other than the main one may be lower."
    )
    max_answer_loss_rise: float = Field(
        0.05, description="By what share of the rival's the answer loss may be higher."
    )
    max_form_loss: float = Field(
        0.02, description="By how much the share of answers in good form may be lower."
    )
    max_sampled_form_loss: float = Field(
        0.10, description="The same of sampled answers, which are fewer and vary more."
    )
    max_ability_loss_rise: float = Field(
        0.25, description="By how many nats per token the loss on the ability set may be higher."
    )


def gate_policy(config: TrainingConfig) -> GatePolicy:
    """The policy that `config` asks for."""
    return GatePolicy(
        confidence=config.gate_confidence,
        min_rows=config.gate_min_rows,
        max_ability_loss_rise=config.max_ability_loss_rise,
    )
