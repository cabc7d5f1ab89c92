"""What passes between the command `export` and its worker."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from qwen3ft.config import TrainingConfig
from qwen3ft.records.base import Record
from qwen3ft.records.plan import ModelShape

ADAPTER, MERGED, REQUANTISED = "adapter", "merged", "merged in 4 bits"
"""The three forms of one fine-tuned model: what was tested and promoted, and what is exported."""


class ExportRequest(Record):
    """Merge an adapter into its base and compare the forms; the outcome is a `ParityReport`."""

    config: TrainingConfig = Field(description="That of the run, with this machine's limits.")
    base: str = Field(description="Folder with the unquantised safetensors.")
    adapter: str
    quantization: str = Field(description="4-bit setting that the adapter was trained on.")
    shape: ModelShape
    merged: str = Field(description="Folder to write the merged model into; exists, and is empty.")
    rows_path: str = Field(description="Held-out rows (jsonl): question, answer, reasoning.")
    device: Literal["cuda", "cpu"]
    batch_size: int = Field(8, ge=1)


class FormScore(Record):
    """What one form of the model makes of the held-out rows."""

    form: str
    exact_match: float = Field(description="Share of answers equal to the reference, 0 to 1.")
    answer_loss: float = Field(description="Mean negative log-likelihood per answer token (nats).")
    same_answers: float = Field(description="Share of answers that are the adapter's, by letters.")
    lost_answers: float = Field(
        description="Share of rows that the adapter answers right and this form does not."
    )
    loss_drift: float = Field(description="answer_loss less the adapter's (nats).")
    seconds: float


class ParityReport(Record):
    """Whether the merged model, also in 4 bits again, is still the one that was tested."""

    rows: int
    thinking: bool = Field(description="Whether any of the rows asks for reasoning first.")
    max_loss_drift: float
    max_lost_answers: float
    scores: tuple[FormScore, ...] = Field(description="Of the adapter, merged, merged in 4 bits.")

    @property
    def objections(self) -> tuple[str, ...]:
        """What drifted past its limit, with numbers; empty if the export may stand."""
        found = []
        for score in self.scores:
            # written so that a loss that is not a number never passes
            if not score.loss_drift <= self.max_loss_drift:
                found.append(
                    f"{score.form}: answer loss {score.answer_loss:.4g}, {score.loss_drift:+.4g} "
                    f"(limit {self.max_loss_drift:+g})"
                )
            if score.lost_answers > self.max_lost_answers:
                found.append(
                    f"{score.form}: {score.lost_answers:.1%} of {self.rows} rows are no longer "
                    f"answered right (limit {self.max_lost_answers:.1%})"
                )
        return tuple(found)
