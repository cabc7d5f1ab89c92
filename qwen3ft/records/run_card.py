"""The parts of a run's card that tell its story: data, plan, attempts, curves, answers, what next.

Texts that come from users are as `qwen3ft.report.safe_text` leaves them: masked, cut, without
characters that would change how the page around them reads. Numbers are finite, or None.
"""

from __future__ import annotations

from datetime import UTC, datetime
from typing import Literal

from pydantic import Field

from qwen3ft.records.base import Record
from qwen3ft.records.evaluation import (
    Comparison,
    JudgeReport,
    MetricName,
    ModelLabel,
    ModelScore,
    RivalLabel,
)

NOTHING_NEW = "NothingNew"
"""Name of the completed state of a run that found nothing to train on."""


Outcome = Literal["promoted", "kept", "deferred", "failed", "nothing new"]
"""What a run came to, in the words of a night."""

CurvePoint = tuple[float, float]


class SettingLine(Record):
    """One derived setting."""

    name: str
    value: str
    why: str


class SettingChange(Record):
    """One setting of an attempt that is not that of the attempt before it."""

    name: str
    before: str
    after: str
    why: str = ""


class AttemptSummary(Record):
    """One row of the table of attempts."""

    attempt: int
    outcome: str = Field(description="'completed' or the failure's kind.")
    detail: str
    micro_batch_size: int
    gradient_accumulation_steps: int
    gradient_checkpointing: bool
    learning_rate: float
    resumed_from_step: int | None
    seconds: float
    changes: tuple[SettingChange, ...] = Field((), description="Since the attempt before it.")


class FileLine(Record):
    """One file of a run's data."""

    path: str
    role: str
    rows: int = Field(description="Rows read in it.")
    new_rows: int = Field(0, description="Training rows first read in it, not seen before.")
    state: Literal["new", "changed", "unchanged", "gone"] = "unchanged"


class DataSection(Record):
    """What a run was trained on, and what of it is new."""

    digest: str
    rows_read: int
    went: dict[str, int] = Field(description="Where the rows read went; the sum is all of them.")
    train_tokens: int
    since: str | None = Field(None, description="The champion that 'new' is counted from.")
    new_rows: int = 0
    files: tuple[FileLine, ...] = ()
    examples: tuple[str, ...] = Field((), description="What a few of the new rows ask.")
    warnings: tuple[str, ...] = ()


class PlanSection(Record):
    """What was planned, and why."""

    title: str
    headline: str
    settings: tuple[SettingLine, ...]
    predicted_gb: float
    budget_gb: float


class LossCurve(Record):
    """(optimizer step, nats per trained token) of one attempt; long curves are thinned."""

    attempt: int
    training: tuple[CurvePoint, ...] = ()
    held_out: tuple[CurvePoint, ...] = ()


class MemoryCurve(Record):
    """(minutes, GB of the whole process) of one attempt, on one axis with those of the others."""

    attempt: int
    start_minutes: float
    end_minutes: float
    predicted_gb: float | None = None
    budget_gb: float | None = None
    process: tuple[CurvePoint, ...] = ()


class ModelAnswer(Record):
    """What one model answered."""

    model: Literal["base", "champion", "candidate"]
    text: str
    right: bool = Field(description="Whether it equals the reference, as exact match counts.")


class AnsweredQuestion(Record):
    """One held-out question with the answer of every model."""

    question: str
    reference: str
    split: str
    answers: tuple[ModelAnswer, ...]


class FailureSection(Record):
    """What ended a run that failed."""

    kind: str
    what: str
    why: str = ""


class NextStep(Record):
    """Something that a reader may want to do now."""

    what: str
    command: str = Field("", description="Exactly what to type; empty where nothing can be done.")


class RunCard(Record):
    """The story of a run: card.json, card.md and card.html in its folder, and in MLflow.

    Every run that got as far as its folder has one. What a run did not get to is empty or None.
    """

    title: str
    outcome: Outcome = "kept"
    verdict: str = Field(description="One sentence.")
    reasons: tuple[str, ...] = ()
    run_id: str = ""
    model: str = ""
    at: datetime = Field(default_factory=lambda: datetime.now(UTC), description="End of the run.")
    data: DataSection | None = None
    plan: PlanSection | None = None
    attempts: tuple[AttemptSummary, ...] = ()
    loss: tuple[LossCurve, ...] = ()
    memory: tuple[MemoryCurve, ...] = ()
    trained_on: str = ""
    base_score: float | None = Field(None, description="Exact match of the base model, 0 to 1.")
    tuned_score: float | None = Field(None, description="With the new adapter, 0 to 1.")
    scores_by_split: dict[str, tuple[float, float, int]] = Field(
        default_factory=dict, description="Split: base, tuned, questions."
    )
    scores: tuple[ModelScore, ...] = ()
    exact_match_intervals: dict[ModelLabel, tuple[float, float]] = Field(
        default_factory=dict, description="Wilson's interval of each model's share."
    )
    confidence: float = Field(0.95, description="Of all intervals.")
    main_metric: MetricName = "exact_match"
    comparisons: tuple[Comparison, ...] = ()
    champion_version: str | None = Field(
        None, description="In use before this run; 'none' if none was, None if that is not known."
    )
    version: str | None = Field(None, description="This run's own, once it is registered.")
    forgetting: str = Field("", description="Loss on the ability set, before and after.")
    judge: JudgeReport | None = Field(None, description="A second opinion, which decides nothing.")
    answers: tuple[AnsweredQuestion, ...] = Field((), description="Where the models differ most.")
    held_out_loss_before: float | None = None
    held_out_loss_after: float | None = None
    peak_memory_gb: float | None = None
    budget_gb: float | None = None
    tokens_per_second: float | None = Field(None, description="Of training; no padding counted.")
    kernels: str = Field("", description="Which path trained, and why that one.")
    seconds_by_stage: dict[str, float] = Field(default_factory=dict)
    failure: FailureSection | None = None
    degraded: tuple[str, ...] = ()
    adapter_path: str | None = None
    roll_back: NextStep = NextStep(what="Nothing was put into use.")
    next_steps: tuple[NextStep, ...] = ()
    prefect_url: str | None = None
    mlflow_url: str | None = None
    notes: tuple[str, ...] = Field((), description="What a reader should know before believing.")

    @property
    def rival(self) -> RivalLabel:
        """The model to beat: the champion if it was evaluated, else the base."""
        return "champion" if any(one.label == "champion" for one in self.scores) else "base"

    @property
    def gain(self) -> Comparison | None:
        """The candidate against its rival in the main metric; None if they were not compared."""
        wanted = (self.rival, self.main_metric)
        return next((c for c in self.comparisons if (c.rival, c.metric) == wanted), None)
