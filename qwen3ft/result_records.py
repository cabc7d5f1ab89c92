"""What came out of a run: answers, scores, the verdict, and the card that shows all of it."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from qwen3ft.record import Record
from qwen3ft.records import AttemptSummary


class SplitScore(Record):
    """Scores of one model on one group of held-out questions."""

    rows: int
    exact_match: float = Field(description="Share of answers equal to the reference, 0 to 1.")


class ModelScore(Record):
    """Scores of one model (base, champion or candidate) on all held-out questions."""

    label: Literal["base", "champion", "candidate"]
    rows: int
    exact_match: float
    answer_loss: float = Field(description="Mean negative log-likelihood per answer token.")
    stopped_share: float = Field(description="Share of answers that ended with the end token.")
    empty_share: float
    looping_share: float
    by_split: dict[str, SplitScore] = Field(default_factory=dict)


class SideBySide(Record):
    """One question with every model's answer."""

    question: str
    reference: str
    base: str
    candidate: str
    champion: str | None = None
    split: str = "test"


class InferenceReport(Record):
    """What the saved adapter answers, beside the base model and the champion."""

    adapter_path: str
    questions_sha256: str
    scores: tuple[ModelScore, ...]
    samples: tuple[SideBySide, ...]
    answers_path: str = Field(description="jsonl with every question and answer.")
    checks: dict[str, bool] = Field(description="Name of a quality check: passed.")
    champion_version: str | None = None
    seconds: float = 0.0

    def score(self, label: str) -> ModelScore | None:
        """The scores of `label`, if it was evaluated."""
        return next((score for score in self.scores if score.label == label), None)


class Verdict(Record):
    """Whether the new adapter replaces the one in use, with the numbers."""

    decision: Literal["promoted", "kept", "deferred"]
    reasons: tuple[str, ...]
    registered_model: str | None = None
    version: str | None = None


class Champion(Record):
    """The registered adapter in use, as MLflow's registry knows it."""

    registered_model: str
    version: str
    source_uri: str
    tags: dict[str, str] = Field(default_factory=dict)
    adapter_path: str | None = Field(None, description="Verified local copy, once fetched.")


class RunCard(Record):
    """What a run achieved, on one screen; kept as card.json and card.md in the run's folder."""

    title: str
    trained_on: str
    base_score: float = Field(description="Exact match of the base model, 0 to 1.")
    tuned_score: float = Field(description="Exact match with the new adapter, 0 to 1.")
    scores_by_split: dict[str, tuple[float, float, int]] = Field(
        default_factory=dict, description="Split: base, tuned, questions."
    )
    held_out_loss_before: float
    held_out_loss_after: float
    peak_memory_gb: float
    budget_gb: float
    tokens_per_second: float | None = Field(None, description="Of training; no padding counted.")
    kernels: str = Field("", description="Which path trained, and why that one.")
    seconds_by_stage: dict[str, float]
    attempts: tuple[AttemptSummary, ...]
    verdict: str
    adapter_path: str
    prefect_url: str | None = None
    mlflow_url: str | None = None
    notes: tuple[str, ...] = Field((), description="What a reader should know before believing.")
