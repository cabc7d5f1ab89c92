"""The parts of a run's card that tell its story: data, plan, attempts, curves, answers, what next.

Texts that come from users are as `qwen3ft.report.safe_text` leaves them: masked, cut, without
characters that would change how the page around them reads. Numbers are finite, or None.
"""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from qwen3ft.records.base import Record

Outcome = Literal["promoted", "kept", "deferred", "failed", "nothing new"]
"""What a run came to, in the words of a night."""

Point = tuple[float, float]


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


class FileStory(Record):
    """One file of a run's data."""

    path: str
    role: str
    rows: int = Field(description="Rows read in it.")
    new_rows: int = Field(0, description="Training rows first read in it, not seen before.")
    state: Literal["new", "changed", "unchanged", "gone"] = "unchanged"


class DataStory(Record):
    """What a run was trained on, and what of it is new."""

    digest: str
    rows_read: int
    went: dict[str, int] = Field(description="Where the rows read went; the sum is all of them.")
    train_tokens: int
    since: str | None = Field(None, description="The champion that 'new' is counted from.")
    new_rows: int = 0
    files: tuple[FileStory, ...] = ()
    examples: tuple[str, ...] = Field((), description="What a few of the new rows ask.")
    warnings: tuple[str, ...] = ()


class PlanStory(Record):
    """What was planned, and why."""

    title: str
    headline: str
    settings: tuple[SettingLine, ...]
    predicted_gb: float
    budget_gb: float


class LossCurve(Record):
    """(optimizer step, nats per trained token) of one attempt; long curves are thinned."""

    attempt: int
    training: tuple[Point, ...] = ()
    held_out: tuple[Point, ...] = ()


class MemoryCurve(Record):
    """(minutes, GB of the whole process) of one attempt, on one axis with those of the others."""

    attempt: int
    start_minutes: float
    end_minutes: float
    predicted_gb: float | None = None
    budget_gb: float | None = None
    process: tuple[Point, ...] = ()


class ModelAnswer(Record):
    """What one model answered."""

    model: Literal["base", "champion", "candidate"]
    text: str
    right: bool = Field(description="Whether it equals the reference, as exact match counts.")


class AnswersBeside(Record):
    """One held-out question with the answer of every model."""

    question: str
    reference: str
    split: str
    answers: tuple[ModelAnswer, ...]


class FailureStory(Record):
    """What ended a run that failed."""

    kind: str
    what: str
    why: str = ""


class Step(Record):
    """Something that a reader may want to do now."""

    what: str
    command: str = Field("", description="Exactly what to type; empty where nothing can be done.")
