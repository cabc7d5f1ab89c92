"""Results of the inference test, the judge's opinion and the gate's verdict."""

from __future__ import annotations

import math
from typing import Literal

from pydantic import Field

from qwen3ft.records.base import Record

MAX_EXPONENT = 700.0
"""Largest argument of exp() whose result fits a float."""

MetricName = Literal["exact_match", "token_f1", "chrf", "answer_loss"]
ModelLabel = Literal["base", "candidate", "champion"]
RivalLabel = Literal["base", "champion"]

MODELS: tuple[ModelLabel, ...] = ("base", "champion", "candidate")
"""Every model of a report, in the order in which they are shown."""

RIVALS: tuple[RivalLabel, ...] = ("base", "champion")


class RowScore(Record):
    """Scores of one model's answer to one question."""

    exact_match: bool
    token_f1: float = Field(description="Between 0 and 1, like chrf.")
    chrf: float
    loss_nats: float | None = Field(description="Summed over the reference; None if not finite.")
    loss_tokens: int = Field(description="Reference tokens that the loss is summed over.")
    form: dict[str, bool] = Field(description="{form check: passed}.")


class SplitScore(Record):
    """Scores of one model on one group of held-out questions."""

    rows: int
    exact_match: float = Field(description="Share of answers equal to the reference, 0 to 1.")


class ModelScore(Record):
    """Scores of one model (base, champion or candidate) on all held-out questions."""

    label: ModelLabel
    rows: int
    exact_match: float = Field(description="Between 0 and 1, like every score but the losses.")
    exact_match_interval: tuple[float, float] | None = None
    """Wilson's score interval of that share; None in reports of earlier versions."""
    token_f1: float = 0.0
    chrf: float = 0.0
    answer_loss: float | None
    """Mean negative log-likelihood (nats) per answer token; None if not finite."""
    ability_loss: float | None = Field(None, description="The same on the ability set.")
    form: dict[str, float] = Field({}, description="{form check: share of answers that pass}.")
    sampled_form: dict[str, float] = Field({}, description="`form` of the sampled answers.")
    by_split: dict[str, SplitScore] = Field(default_factory=dict)

    @property
    def perplexity(self) -> float | None:
        """Perplexity of the references, per token; None if it is not finite."""
        # JSON has no infinity
        if self.answer_loss is None or self.answer_loss > MAX_EXPONENT:
            return None
        return math.exp(self.answer_loss)


class Comparison(Record):
    """The candidate's gain over a rival in one metric, with its confidence interval."""

    rival: RivalLabel
    metric: MetricName
    rows: int
    gain: float = Field(description="Above zero is better, also for losses (in nats).")
    low: float = Field(description="Lower bound of the interval of the paired gain.")
    high: float


class SideBySide(Record):
    """One question with every model's answer."""

    question: str
    reference: str
    base: str
    candidate: str
    champion: str | None = None
    split: str = "test"


class JudgeReport(Record):
    """Outcome of the judge, a model that compares the candidate's answers with a rival's."""

    model: str
    rival: RivalLabel
    rows: int = Field(description="Questions chosen; those in no count below were not judged.")
    wins: int = Field(description="The candidate's answer is better in both orders.")
    ties: int = Field(description="Neither is better, or the two orders disagree.")
    losses: int
    unreadable: int = Field(description="Questions with a reply that is not a verdict.")
    win_share: float = Field(description="Wins over all judged questions, 0 to 1.")
    low: float = Field(description="Wilson's interval of that share.")
    high: float
    seconds: float
    problem: str = Field("", description="Why questions were left out; '' if none were.")

    @property
    def judged(self) -> int:
        """Number of questions with a verdict."""
        return self.wins + self.ties + self.losses


class InferenceReport(Record):
    """Answers and scores of the candidate beside those of the base model and the champion."""

    adapter_path: str
    questions_sha256: str
    scores: tuple[ModelScore, ...]
    main_metric: MetricName = "exact_match"
    comparisons: tuple[Comparison, ...] = ()
    samples: tuple[SideBySide, ...]
    answers_path: str = Field(description="JSON lines with every question and answer.")
    scores_path: str = Field("", description="JSON lines with the scores of every question.")
    checks: dict[str, bool] = Field(description="{quality check: passed}.")
    champion_version: str | None = None
    generated: dict[str, int] = Field({}, description="{model: answers not found in the cache}.")
    seconds: float = 0.0
    answered_by: str = Field("", description="Path of the answers, with its reason or its sizes.")
    questions_planned: int = Field(0, description="0 in reports of earlier versions.")
    stopped_early: str = Field("", description="Why not all of them were asked; '' if all were.")
    confidence: float | None = Field(None, description="Level of the intervals, if known.")
    answer_seconds: float = Field(0.0, description="Seconds of answers and losses alone.")
    predicted_seconds: float | None = Field(None, description="The same as predicted.")
    peak_bytes: int | None = Field(None, description="Measured peak of the whole process.")
    predicted_bytes: int | None = Field(None, description="The same as predicted.")
    may_think: bool = Field(False, description="The chat template writes reasoning.")
    thinking_asked: int = Field(0, description="Questions before whose answers models may think.")
    thinking_cut: dict[str, int] = Field(
        {}, description="{model: thinking ended by its budget, or cut off}."
    )
    judge: JudgeReport | None = Field(None, description="A second opinion; the gate ignores it.")

    def score(self, label: str) -> ModelScore | None:
        """Return the scores of the model `label`, None if it was not evaluated."""
        return next((score for score in self.scores if score.label == label), None)

    def comparison(self, rival: str, metric: str) -> Comparison | None:
        """Return the gain over `rival` in `metric`, None if they could not be compared."""
        found = (c for c in self.comparisons if (c.rival, c.metric) == (rival, metric))
        return next(found, None)


class Verdict(Record):
    """The gate's decision about a new adapter, with its reasons in numbers."""

    decision: Literal["promoted", "kept", "deferred"]
    reasons: tuple[str, ...]
    registered_model: str | None = None
    version: str | None = None

    @property
    def sentence(self) -> str:
        """The decision and its first reason; for a kept adapter also the number of others."""
        first, *others = self.reasons or ("no reason was given",)
        if not others or self.decision != "kept":
            return f"{self.decision}: {first}"
        return (
            f"{self.decision}: {first} (and {len(others)} more reason{'s' if others[1:] else ''})"
        )


class Champion(Record):
    """The adapter in use, as MLflow's registry knows it."""

    registered_model: str
    version: str
    source_uri: str
    tags: dict[str, str] = Field(default_factory=dict)
    adapter_path: str | None = Field(None, description="Verified local copy, once it is fetched.")
