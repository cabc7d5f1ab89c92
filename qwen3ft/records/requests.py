"""Requests to workers and their results; the request for training is the `TrainPlan`."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field

from qwen3ft.config import TrainingConfig
from qwen3ft.records.base import Record
from qwen3ft.records.data import ResolvedSources
from qwen3ft.records.evaluation import Champion
from qwen3ft.records.model import ModelShape, ModelSnapshot, ModelSource, SavedAdapter


class QuantizeRequest(Record):
    """Quantise `source` into the folder `target`; the result is a `ModelSnapshot`."""

    config: TrainingConfig
    source: ModelSource
    source_path: str = Field(description="Folder with the unquantised safetensors.")
    target: str
    device: Literal["cuda", "cpu"]


class TokenizerRequest(Record):
    """Try the tokenizer and chat template in a folder; the result is a `TokenizerReport`."""

    folder: str


class TokenizerReport(Record):
    """A tokenizer that was tried within limits of time and memory."""

    rendered: int = Field(description="Conversations rendered.")


class DataRequest(Record):
    """Read, check and tokenise rows into `target`; the result is a `DatasetManifest`."""

    sources: ResolvedSources
    model: ModelSnapshot
    target: str
    known_rows: str | None = Field(None, description="File with the hashes of rows seen before.")


class InferenceRequest(Record):
    """Answer held-out questions with every model; the result is an `InferenceReport`."""

    config: TrainingConfig
    model: ModelSnapshot
    adapter: SavedAdapter
    champion: Champion | None = None
    questions_path: str = Field(description="test.jsonl of the data set: question, answer, split.")
    answers_path: str
    device: Literal["cuda", "cpu"]
    batch_size: int = Field(ge=1)
    budget_gb: float | None = Field(None, description="None for config.max_memory_gb.")
    without_decoder: str = Field("", description="Why transformers has to answer; '' to choose.")
    places: tuple[int, ...] = Field((0,), description="GPU of each rank among the visible ones.")

    @property
    def ranks(self) -> int:
        """Number of processes that answer."""
        return len(self.places)

    @property
    def worker_kind(self) -> str:
        """Kind of worker that answers: one process on the first GPU, or ranks."""
        return "inference" if self.places == (0,) else "answering-ranks"

    @property
    def stall_seconds(self) -> float:
        """Longest silence of a worker."""
        return self.config.stall_seconds


# shown to users, and keys of parity.json
ADAPTER, MERGED, REQUANTISED = "adapter", "merged", "merged in 4 bits"
"""The three forms of a fine-tuned model; the adapter is the one that the gate tested."""

GgufType = Literal["bf16", "q8_0", "q4_k_m"]
"""Types of the merged model's weights in a GGUF file."""


class ExportLimits(Record):
    """Extent and limits of the comparison before an export."""

    max_rows: int = Field(200, ge=1, description="Most held-out rows to compare on.")
    max_loss_drift: float = Field(0.05, ge=0, allow_inf_nan=False)
    """Largest rise of the answer loss (nats)."""
    max_lost_answers: float = Field(0.03, ge=0, le=1)
    """Largest share of rows that only the adapter gets right."""


class ExportRequest(Record):
    """Merge an adapter into its base and compare the forms; the result is a `ParityReport`."""

    config: TrainingConfig = Field(description="The run's settings, with this machine's limits.")
    base: str = Field(description="Folder with the unquantised safetensors.")
    adapter: str
    quantization: str = Field(description="4-bit type that the adapter was trained on.")
    shape: ModelShape
    merged: str = Field(description="Existing empty folder for the merged model.")
    gguf: GgufType | None = Field(None, description="Also write and ask GGUF, beside `merged`.")
    rows_path: str = Field(description="Held-out rows as JSON lines: question, answer, reasoning.")
    device: Literal["cuda", "cpu"]
    batch_size: int = Field(8, ge=1)
    limits: ExportLimits = ExportLimits()


class FormScore(Record):
    """Scores of one form of the model on the held-out rows."""

    form: str
    exact_match: float = Field(description="Share of answers equal to the reference, 0 to 1.")
    answer_loss: float | None = Field(
        description="Mean negative log-likelihood per answer token (nats); None of GGUF, whose "
        "server gives answers only."
    )
    same_answers: float = Field(description="Share of answers identical to the adapter's, 0 to 1.")
    lost_answers: float = Field(description="Share of rows that only the adapter gets right.")
    loss_drift: float | None = Field(description="`answer_loss` minus the adapter's (nats).")
    seconds: float


class ParityReport(Record):
    """Comparison of the merged model, in each of its forms, with the tested adapter."""

    rows: int
    thinking: bool = Field(description="True if any row has reasoning before its answer.")
    max_loss_drift: float
    max_lost_answers: float
    scores: tuple[FormScore, ...] = Field(description="One for each form, the adapter first.")

    @property
    def objections(self) -> tuple[str, ...]:
        """The limits that were exceeded, with numbers; empty if the export is good."""
        found = []
        for score in self.scores:
            # not `>`: a loss that is NaN must not pass
            if score.loss_drift is not None and not score.loss_drift <= self.max_loss_drift:
                found.append(
                    f"{score.form}: answer loss {score.answer_loss:.4g}, {score.loss_drift:+.4g} "
                    f"(limit {self.max_loss_drift:+g})"
                )
            if score.lost_answers > self.max_lost_answers:
                found.append(
                    f"{score.form}: {score.lost_answers:.1%} of {self.rows} rows are no longer "
                    f"answered correctly (limit {self.max_lost_answers:.1%})"
                )
        return tuple(found)


class AskRequest(Record):
    """Load an adapter on its 4-bit base and answer questions; the result is a `ChatEnded`."""

    config: TrainingConfig
    adapter: str
    device: Literal["cuda", "cpu"]
    thinking: bool = Field(description="True to let the model think first.")


class ChatQuestion(Record):
    """One question, as the messages so far; or, with `end`, the end of the chat."""

    messages: tuple[dict[str, Any], ...] = ()
    end: bool = False


class Chunk(Record):
    """One event of the worker: 'ready' once, then texts, and 'end' after each answer."""

    kind: Literal["ready", "thinking", "answer", "end"]
    text: str = ""
    tokens: int = Field(0, description="With 'end': tokens of the whole answer.")
    stopped: bool = Field(True, description="With 'end': False if cut off at the limit.")


class ChatEnded(Record):
    """Result of a worker whose chat was ended by the user."""

    answered: int
