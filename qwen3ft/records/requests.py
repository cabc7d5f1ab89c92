"""What each kind of worker is asked to do, besides training (whose request is the `TrainPlan`)."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from qwen3ft.config import TrainingConfig
from qwen3ft.records.base import Record
from qwen3ft.records.evaluation import Champion
from qwen3ft.records.plan import ModelSnapshot, ModelSource, SavedAdapter


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
