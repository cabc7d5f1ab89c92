"""The run card and its sections: data, plan, attempts, curves, scores, answers, next steps.

Texts of users are masked, cut and free of control characters. Numbers are finite or None.
"""

from __future__ import annotations

from datetime import UTC, datetime
from typing import Literal

from pydantic import Field

from qwen3ft.records.base import Record
from qwen3ft.records.evaluation import Comparison, JudgeReport, MetricName, ModelScore, RivalLabel

NOTHING_NEW = "Nothing new"
"""Name of the completed state of a run that found nothing new to train on."""

ALREADY_DONE = "Already done"
"""Name of the completed state of a run whose night another run has finished or is running."""

DEGRADED = "Degraded"
"""Name of the completed state of a run that was kept and fell short of what was asked."""

COMPLETED_STATES = ("Promoted", "Kept", DEGRADED, "Deferred", NOTHING_NEW, ALREADY_DONE)
"""Names of the states of type COMPLETED in which flow runs end."""

Outcome = Literal["promoted", "kept", "deferred", "failed", "cancelled", "nothing new"]
"""Outcome of a run in one word."""

NO_CHAMPION = "none"
"""Instead of a version where no adapter was in use."""

CurvePoint = tuple[float, float]

FileState = Literal["new", "changed", "gone", "unchanged"]
"""Compared with the champion's data, in the order in which files are listed."""


class SettingLine(Record):
    """One derived setting."""

    name: str
    value: str
    why: str


class SettingChange(Record):
    """A setting that differs from the attempt before."""

    name: str
    before: str
    after: str
    why: str = ""


class AttemptSummary(Record):
    """One row of the table of attempts."""

    attempt: int
    outcome: str = Field(description="'completed' or the kind of the failure.")
    detail: str
    micro_batch_size: int
    gradient_accumulation_steps: int
    gradient_checkpointing: bool
    learning_rate: float
    resumed_from_step: int | None
    seconds: float
    changes: tuple[SettingChange, ...] = Field((), description="Since the attempt before.")


class FileLine(Record):
    """One file that a run read."""

    path: str
    role: str
    rows: int = Field(description="Rows read from it.")
    new_rows: int = Field(0, description="Training rows that no earlier run saw.")
    state: FileState = "unchanged"
    notes: tuple[str, ...] = Field((), description="Its encoding, its sheet: as it was read.")


class DataSection(Record):
    """The data that a run was trained on, and the new part of it."""

    digest: str
    rows_read: int
    went: dict[str, int] = Field(description="{use: rows}; adds up to `rows_read`.")
    train_tokens: int
    since: str | None = Field(None, description="The champion that new rows are counted from.")
    new_rows: int = 0
    again: str = Field("", description="Reason to train although nothing is new.")
    files: tuple[FileLine, ...] = ()
    examples: tuple[str, ...] = Field((), description="Questions of a few new rows.")
    warnings: tuple[str, ...] = ()


class PlanSection(Record):
    """The plan, setting by setting, with its reasons."""

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
    """(minutes, GB of the whole process) of one attempt, on a time axis that attempts share."""

    attempt: int
    start_minutes: float
    end_minutes: float
    predicted_gb: float | None = None
    budget_gb: float | None = None
    process: tuple[CurvePoint, ...] = ()


class ModelAnswer(Record):
    """One model's answer."""

    model: Literal["base", "champion", "candidate"]
    text: str
    right: bool = Field(description="Exact match with the reference.")


class AnsweredQuestion(Record):
    """One held-out question with every model's answer."""

    question: str
    reference: str
    split: str
    answers: tuple[ModelAnswer, ...]


class FailureSection(Record):
    """The error that ended a run."""

    kind: str
    what: str
    why: str = ""


class NextStep(Record):
    """Something that the reader may want to do now."""

    what: str
    command: str = Field("", description="The command to type; '' if there is none.")


class RunCard(Record):
    """The report of a run: card.json, card.md and card.html in its folder and in MLflow.

    Every run that has a folder has a card. Fields of stages that the run did not reach are empty
    or None.
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
    tuned_score: float | None = Field(None, description="Exact match of the candidate, 0 to 1.")
    scores_by_split: dict[str, tuple[float, float, int]] = Field(default_factory=dict)
    """{split: (base, candidate, questions)}."""
    scores: tuple[ModelScore, ...] = ()
    confidence: float = Field(0.95, description="Confidence of all intervals, 0 to 1.")
    main_metric: MetricName = "exact_match"
    answered_by: str = ""
    questions: str = ""
    thinking: str = ""
    comparisons: tuple[Comparison, ...] = ()
    champion_version: str | None = None
    """In use before this run; 'none' if there was none, None if unknown."""
    compared_with: str = Field("", description="Models that the candidate was compared with.")
    version: str | None = Field(None, description="This run's, once it is registered.")
    forgetting: str = Field("", description="Loss on the ability set before and after.")
    judge: JudgeReport | None = Field(None, description="A second opinion; the gate ignores it.")
    answers: tuple[AnsweredQuestion, ...] = Field((), description="Where the models differ most.")
    held_out_loss_before: float | None = None
    held_out_loss_after: float | None = None
    peak_memory_gb: float | None = None
    budget_gb: float | None = None
    tokens_per_second: float | None = Field(None, description="Speed of training, without padding.")
    kernels: str = Field("", description="Kernels that trained, and why.")
    seconds_by_stage: dict[str, float] = Field(default_factory=dict)
    failure: FailureSection | None = None
    degraded: tuple[str, ...] = ()
    damaged_lines: tuple[int, ...] = Field((), description="Lines of the journal not in MLflow.")
    adapter_path: str | None = None
    roll_back: NextStep = NextStep(what="Nothing was put into use.")
    next_steps: tuple[NextStep, ...] = ()
    prepare_shell: str = Field("", description="Typed once, it makes these commands work.")
    # None without a server: what is recorded locally has no page
    prefect_url: str | None = None
    mlflow_url: str | None = None
    notes: tuple[str, ...] = Field((), description="Caveats of the numbers above.")

    @property
    def state_name(self) -> str:
        """Name of the final state of the flow run: the verdict in a word or two."""
        degraded = self.outcome == "kept" and self.degraded
        return DEGRADED if degraded else self.outcome.capitalize()

    @property
    def rival(self) -> RivalLabel:
        """The model to beat: the champion if it was evaluated, else the base model."""
        return "champion" if any(one.label == "champion" for one in self.scores) else "base"

    @property
    def gain(self) -> Comparison | None:
        """Gain over the rival in the main metric; None if they were not compared."""
        wanted = (self.rival, self.main_metric)
        return next((c for c in self.comparisons if (c.rival, c.metric) == wanted), None)
