"""What each kind of worker is asked to do, besides training (whose request is the `TrainPlan`)."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field

from qwen3ft.config import TrainingConfig
from qwen3ft.records.base import Record
from qwen3ft.records.evaluation import Champion
from qwen3ft.records.model import ModelShape, ModelSnapshot, ModelSource, SavedAdapter


class QuantizeRequest(Record):
    """Quantise `source` once and keep it at `target`; the outcome is a `ModelSnapshot`."""

    config: TrainingConfig
    source: ModelSource
    source_path: str = Field(description="Folder with the unquantised safetensors.")
    target: str
    device: Literal["cuda", "cpu"]


class DataRequest(Record):
    """Read, check and tokenise rows into `target`; the outcome is a `DatasetManifest`."""

    config: TrainingConfig
    model: ModelSnapshot
    target: str
    known_rows: str | None = Field(None, description="File of the rows seen before: `known_rows`.")


class InferenceRequest(Record):
    """Answer held-out questions with base, champion and candidate; gives an `InferenceReport`."""

    config: TrainingConfig
    model: ModelSnapshot
    adapter: SavedAdapter
    champion: Champion | None = None
    questions_path: str = Field(description="test.jsonl of the dataset: question, answer, split.")
    answers_path: str
    device: Literal["cuda", "cpu"]
    batch_size: int = Field(ge=1)
    budget_gb: float | None = Field(None, description="The plan's; else config.max_memory_gb.")


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


class AskRequest(Record):
    """Load an adapter on its 4-bit base and answer what is asked; the outcome is `ChatEnded`."""

    config: TrainingConfig
    adapter: str
    device: Literal["cuda", "cpu"]
    thinking: bool = Field(description="Whether it is asked to think first.")


class ChatQuestion(Record):
    """One question, as the messages so far; or the end of asking."""

    messages: tuple[dict[str, Any], ...] = ()
    end: bool = False


class Chunk(Record):
    """What the worker tells, as it happens: 'ready' once; pieces of text; 'end' of each answer."""

    kind: Literal["ready", "thinking", "answer", "end"]
    text: str = ""
    tokens: int = Field(0, description="Of the whole answer, with 'end'.")
    stopped: bool = Field(True, description="With 'end': by the end token, not by the limit.")


class ChatEnded(Record):
    """A worker that was told that nothing more is asked."""

    answered: int
