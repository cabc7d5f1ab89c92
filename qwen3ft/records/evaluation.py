"""What came out of a run: answers, scores, the verdict, and the card that shows all of it."""

from __future__ import annotations

import math
from typing import Literal

from pydantic import Field

from qwen3ft.records.base import Record

MAX_EXPONENT = 700.0
"""exp() of more overflows a float."""


MetricName = Literal["exact_match", "token_f1", "chrf", "answer_loss"]
ModelLabel = Literal["base", "candidate", "champion"]
RivalLabel = Literal["base", "champion"]

MODELS: tuple[ModelLabel, ...] = ("base", "champion", "candidate")
"""In the order in which they are shown."""

RIVALS: tuple[RivalLabel, ...] = ("base", "champion")


class RowScore(Record):
    """What one model made of one question."""

    exact_match: bool
    token_f1: float = Field(description="0 to 1, as chrf.")
    chrf: float
    loss_nats: float | None = Field(description="Summed over the reference; None: not finite.")
    loss_tokens: int = Field(description="Tokens of the reference that the loss is summed over.")
    form: dict[str, bool] = Field(description="Check of form: passed.")


class SplitScore(Record):
    """Scores of one model on one group of held-out questions."""

    rows: int
    exact_match: float = Field(description="Share of answers equal to the reference, 0 to 1.")


class ModelScore(Record):
    """Scores of one model (base, champion or candidate) on all held-out questions."""

    label: ModelLabel
    rows: int
    exact_match: float = Field(description="0 to 1, as all scores but the losses.")
    token_f1: float = 0.0
    chrf: float = 0.0
    answer_loss: float | None = Field(
        description="Mean negative log-likelihood per answer token; None: not finite."
    )
    ability_loss: float | None = Field(
        None, description="The same on the ability set: see `qwen3ft.evaluation.ability`."
    )
    form: dict[str, float] = Field(
        default_factory=dict, description="Check of form: share of answers that pass."
    )
    sampled_form: dict[str, float] = Field(
        default_factory=dict, description="The same of answers that were sampled, not greedy."
    )
    by_split: dict[str, SplitScore] = Field(default_factory=dict)

    @property
    def perplexity(self) -> float | None:
        """Of the right answers, per token."""
        if self.answer_loss is None or self.answer_loss > MAX_EXPONENT:
            return None
        return math.exp(self.answer_loss)


class Comparison(Record):
    """By how much the candidate is better than a rival in one metric, with its interval."""

    rival: RivalLabel
    metric: MetricName
    rows: int
    gain: float = Field(description="Above zero is better, for losses (in nats) too.")
    low: float = Field(description="Lower bound of the interval, on the same questions.")
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
    """How often another model finds the candidate's answers better than a rival's: see `judge`."""

    model: str
    rival: RivalLabel
    rows: int = Field(description="Questions chosen; what is in no count was not judged.")
    wins: int = Field(description="The candidate's answer is better, in both orders.")
    ties: int = Field(description="Neither is, or the orders do not agree.")
    losses: int
    unreadable: int = Field(description="Questions on which the judge said something else.")
    win_share: float = Field(description="Of wins, ties and losses, 0 to 1.")
    low: float = Field(description="Wilson's interval of that share.")
    high: float
    seconds: float
    problem: str = Field("", description="Why questions were not judged; '' if all were.")

    @property
    def judged(self) -> int:
        """Questions that the judge answered."""
        return self.wins + self.ties + self.losses


class InferenceReport(Record):
    """What the saved adapter answers, beside the base model and the champion."""

    adapter_path: str
    questions_sha256: str
    scores: tuple[ModelScore, ...]
    main_metric: MetricName = "exact_match"
    comparisons: tuple[Comparison, ...] = ()
    samples: tuple[SideBySide, ...]
    answers_path: str = Field(description="jsonl with every question and answer.")
    scores_path: str = Field("", description="jsonl with every question's scores by model.")
    checks: dict[str, bool] = Field(description="Name of a quality check: passed.")
    champion_version: str | None = None
    generated: dict[str, int] = Field(
        default_factory=dict, description="Answers not known before, by model."
    )
    seconds: float = 0.0
    judge: JudgeReport | None = Field(None, description="A second opinion, which decides nothing.")

    def score(self, label: str) -> ModelScore | None:
        """The scores of `label`, if it was evaluated."""
        return next((score for score in self.scores if score.label == label), None)

    def comparison(self, rival: str, metric: str) -> Comparison | None:
        """The candidate against `rival` in `metric`; None if they could not be compared."""
        found = (c for c in self.comparisons if (c.rival, c.metric) == (rival, metric))
        return next(found, None)


class Verdict(Record):
    """Whether the new adapter replaces the one in use, with the numbers."""

    decision: Literal["promoted", "kept", "deferred"]
    reasons: tuple[str, ...]
    registered_model: str | None = None
    version: str | None = None

    @property
    def sentence(self) -> str:
        """The decision and its first reason; how many others there are against the adapter."""
        first, *others = self.reasons or ("no reason was given",)
        more = f" (and {len(others)} more)" if others and self.decision == "kept" else ""
        return f"{self.decision}: {first}{more}"


class Champion(Record):
    """The registered adapter in use, as MLflow's registry knows it."""

    registered_model: str
    version: str
    source_uri: str
    tags: dict[str, str] = Field(default_factory=dict)
    adapter_path: str | None = Field(None, description="Verified local copy, once fetched.")
