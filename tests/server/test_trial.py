"""A new version on trial: who is asked, what counts as bad, and when it is stopped."""

from __future__ import annotations

import random
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import pytest

from qwen3ft.records.serving import Ended
from qwen3ft.server.answers import AnsweredRequest
from qwen3ft.server.questions import ChatQuestionBody
from qwen3ft.server.served import Version
from qwen3ft.server.trial import ENOUGH_ANSWERS, Evidence, Trial, fault_of


def version(name: str) -> Version:
    return Version(name, None, Path(), {}, cast(Any, None))


@dataclass
class Rates:
    """Shares of the answers that are bad, and seconds that an answer takes."""

    bad: float = 0.0
    seconds: float = 0.1


def run_trial(old: Rates, new: Rates, share: float = 0.05, seed: int = 0) -> tuple[Trial, int]:
    """Answer requests until it is decided; return the trial and the requests of the new one."""
    trial, draw = Trial(version("old"), version("new"), share, seed), random.Random(seed + 1)
    asked_new = 0
    for _ in range(100_000):
        chosen = trial.assign()
        asked_new += chosen is trial.new
        rates = new if chosen is trial.new else old
        fault = "empty" if draw.random() < rates.bad else ""
        trial.note(chosen, fault, rates.seconds * draw.lognormvariate(0, 0.5))
        if trial.decided.is_set():
            return trial, asked_new
    raise AssertionError("never decided")


@pytest.mark.parametrize("share", [0.01, 0.05, 0.1, 0.2])
def test_the_new_version_gets_its_share_and_no_more(share: float) -> None:
    """One of each block, at a place by lot; none of the first block."""
    trial = Trial(version("old"), version("new"), share, seed=3)
    block = round(1 / share)
    chosen = [trial.assign() is trial.new for _ in range(50 * block)]
    counts = [sum(chosen[start : start + block]) for start in range(0, len(chosen), block)]
    assert counts == [0] + [1] * 49
    places = {
        chosen[start : start + block].index(True) for start in range(block, 50 * block, block)
    }
    assert len(places) > min(3, block - 1)


def test_a_bad_version_is_stopped_before_many_have_seen_it() -> None:
    """Every answer bad, every second, or three times as slow beyond doubt."""
    for new in (Rates(bad=1), Rates(bad=0.5), Rates(seconds=1.0)):
        for seed in range(20):
            trial, asked = run_trial(Rates(bad=0.01), new, seed=seed)
            assert trial.objection
            assert asked <= 40
    assert "bad" not in run_trial(Rates(), Rates(bad=1))[0].summary().partition(";")[0]
    assert "8 empty" in run_trial(Rates(), Rates(bad=1))[0].summary()


def test_a_version_that_is_no_worse_passes() -> None:
    """Also if both are often bad, or the new one is better."""
    pairs = [(0.0, 0.0), (0.05, 0.05), (0.3, 0.3), (0.3, 0.05)]
    for old, new in pairs:
        for seed in range(15):
            trial, asked = run_trial(Rates(bad=old), Rates(bad=new), seed=seed)
            assert not trial.objection
            assert asked == ENOUGH_ANSWERS


def test_evidence_is_a_fair_bet_where_both_are_alike() -> None:
    """The likelihood ratio's expected value is 1 after each event, so its bound holds."""
    for share in (0.01, 0.05, 0.2):
        gains = []
        for is_new in (True, False):
            evidence = Evidence(share)
            evidence.add(is_new=is_new)
            gains.append(evidence.log_ratio)
        mean = share * 2.718281828459045 ** gains[0] + (1 - share) * 2.718281828459045 ** gains[1]
        assert mean == pytest.approx(1)


@pytest.mark.parametrize(("model", "counted"), [(None, 1), ("champion", 1), ("new", 0)])
def test_a_request_that_names_a_version_is_no_evidence(model: str | None, counted: int) -> None:
    """Only what was assigned by lot tells how often each version is bad."""
    trial = Trial(version("old"), version("new"), 0.2)
    messages = [{"role": "user", "content": "Which year?"}]
    body = ChatQuestionBody.model_validate({"messages": messages, "model": model})
    trial.observe(AnsweredRequest(trial.new, body, 503, "", "", None, 0.1))
    assert trial.counts[trial.new].answers == counted
    assert trial.counts[trial.new].faults["error"] == counted


STOPPED = Ended(id=1, reason="stop", prompt_tokens=3, completion_tokens=3)
CUT = Ended(id=1, reason="length", prompt_tokens=3, completion_tokens=3)


@pytest.mark.parametrize(
    ("question", "answer", "ended", "has_limit", "fault"),
    [
        ("Which year?", "1951", STOPPED, False, ""),
        ("Which year?", "In that year.", STOPPED, False, ""),
        ("Which year?", "", STOPPED, False, "empty"),
        ("Which year?", " \n", STOPPED, True, "empty"),
        ("Which year?", "In that", CUT, False, "endless"),
        ("Which year?", "In that", CUT, True, ""),
        ("Which year?", "so and so on " * 9, STOPPED, False, "endless"),
        ("Which year?", "我不知道", STOPPED, False, "other language"),
        ("哪一年?", "我不知道", STOPPED, False, ""),
        ("哪一年?", "I do not know", STOPPED, False, "other language"),
        ("Which year?", "", None, False, "error"),
    ],
)
def test_what_counts_as_bad(
    question: str, answer: str, ended: Ended | None, has_limit: bool, fault: str
) -> None:
    assert fault_of(question, answer, ended, has_limit=has_limit) == fault
