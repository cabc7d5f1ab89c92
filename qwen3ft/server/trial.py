"""A new version on trial beside the one in use: a share of the requests, and when to stop.

Each request is assigned by lot, so if both versions are alike, an answer that is bad comes from the
new one with the probability of its share, whatever the traffic and the load. The evidence is the
likelihood ratio of those that came, against a new version that is bad `WORSE_TIMES` as often. It is
a test martingale: that it ever passes 1 / `FALSE_ALARM` has at most that probability (Ville's
inequality, 1939; Wald's sequential test, 1945), however often one looks.
"""

from __future__ import annotations

import asyncio
import math
import random
import statistics
from collections import Counter, deque
from dataclasses import dataclass, field

from qwen3ft.evaluation.answers import Question, is_looping
from qwen3ft.evaluation.form_checks import language_fits
from qwen3ft.records.serving import Ended
from qwen3ft.server.answers import CLIENT_LEFT, AnsweredRequest
from qwen3ft.server.questions import ChatQuestionBody
from qwen3ft.server.served import Version

WORSE_TIMES = 3.0
"""Bad answers of the new version for each of the old one, at which it is surely stopped."""

FALSE_ALARM = 0.001
"""Largest probability that a version that is no worse is stopped, by either kind of evidence."""

SLOW_TIMES, SLOW_SECONDS = 3.0, 0.05
"""An answer is slow beyond this multiple of the old version's median, and this much more."""

ENOUGH_ANSWERS = 100
"""Answers of the new version after which it is put into use. At a share of 5 % it takes 8 bad ones
to stop it, at 20 % 10, if the old version has none; fewer than one in 10,000 of those that are bad
in every fourth answer pass."""

MEDIAN_ANSWERS = 200
"""Last answers of the old version that the median is taken of."""


def fault_of(question: str, answer: str, ended: Ended | None, *, has_limit: bool) -> str:
    """Return how an answer is bad, '' if it is not.

    Args:
        question: The last message of the user.
        answer: The text without thinking.
        ended: End of the answer; None if there was an error.
        has_limit: The request itself limits the tokens, so that being cut off is no fault.
    """
    if ended is None:
        return "error"
    if ended.reason == "length":
        if not has_limit:
            return "endless"
        return ""  # what a limit cut off may be empty or begin in any way
    if not answer.strip():
        return "empty"
    if is_looping(answer):
        return "endless"
    return "" if language_fits(answer, Question(question, "")) else "other language"


@dataclass
class Evidence:
    """Log likelihood ratio of one kind of event: the new version's rate is `WORSE_TIMES` the old's.

    Attributes:
        share: Probability that a request is assigned to the new version.
    """

    share: float
    log_ratio: float = 0.0

    def add(self, *, is_new: bool) -> None:
        """Take note of an event of the new or the old version."""
        worse = self.share * WORSE_TIMES / (self.share * WORSE_TIMES + 1 - self.share)
        self.log_ratio += (
            math.log(worse / self.share) if is_new else math.log((1 - worse) / (1 - self.share))
        )

    @property
    def is_enough(self) -> bool:
        """True once the new version is surely worse; there are two kinds of evidence."""
        return self.log_ratio >= math.log(2 / FALSE_ALARM)


@dataclass
class Counts:
    """Answers of one version on trial."""

    answers: int = 0
    faults: Counter[str] = field(default_factory=Counter)

    def __str__(self) -> str:
        faults = ", ".join(f"{count} {fault}" for fault, count in self.faults.most_common())
        return f"{self.answers} answers, {faults or 'none bad'}"


class Trial:
    """One new version beside the one in use.

    Args:
        old: Version in use.
        new: Version on trial, loaded and proven.
        share: Share of the requests for the new one, above 0 and at most 0.2.
        seed: Seed of the lots; None for chance.
    """

    def __init__(self, old: Version, new: Version, share: float, seed: int | None = None) -> None:
        self.old, self.new = old, new
        self._block = round(1 / share)
        self.share = 1 / self._block
        self._lots = random.Random(seed)  # noqa: S311  chance, not secrecy
        self._place = 0
        # a block of the old one alone comes first: the median needs it; its bad answers can only
        # speak for the new one
        self._chosen = self._block
        self._bad, self._slow = Evidence(self.share), Evidence(self.share)
        self._seconds: deque[float] = deque(maxlen=MEDIAN_ANSWERS)
        self._slow_seconds = math.inf  # while too few answers of the old one are known
        self.counts = {old: Counts(), new: Counts()}
        self.decided = asyncio.Event()
        self.objection = False

    def assign(self) -> Version:
        """Return the version for a request: one in each block of them is the new one's, by lot."""
        is_new = self._place == self._chosen
        self._place += 1
        if self._place >= self._block:
            self._place, self._chosen = 0, self._lots.randrange(self._block)
        return self.new if is_new else self.old

    def observe(self, answered: AnsweredRequest) -> None:
        """Take note of a request that is over; a client that leaves tells only that it waited."""
        body, ended, fault = answered.body, answered.ended, ""
        if not isinstance(body, ChatQuestionBody):
            return
        if body.model == answered.version.name:
            return  # it was asked by its name, not by lot
        if answered.status != CLIENT_LEFT:
            fault = fault_of(body.question, answered.answer, ended, has_limit=body.has_limit)
        elif answered.seconds <= self._slow_seconds:
            return
        self.note(answered.version, fault, answered.seconds)

    def summary(self) -> str:
        """Return what both versions did, in words."""
        return f"{self.counts[self.new]}; {self.old.name} meanwhile: {self.counts[self.old]}"

    def note(self, version: Version, fault: str, seconds: float) -> None:
        """Take note of an answer, and decide if that is enough.

        Args:
            version: Its version.
            fault: As `fault_of` returns it.
            seconds: Time from the request to the end.
        """
        counts = self.counts.get(version)
        if counts is None or self.decided.is_set():
            return
        is_new = version is self.new
        counts.answers += 1
        if fault:
            counts.faults[fault] += 1
            self._bad.add(is_new=is_new)
        if seconds > self._slow_seconds:
            counts.faults["slow"] += 1
            self._slow.add(is_new=is_new)
        if not is_new:
            self._seconds.append(seconds)
            if counts.answers % (self._block // 2) == 0:
                self._slow_seconds = SLOW_TIMES * statistics.median(self._seconds) + SLOW_SECONDS
        self.objection = self._bad.is_enough or self._slow.is_enough
        if self.objection or self.counts[self.new].answers >= ENOUGH_ANSWERS:
            self.decided.set()
