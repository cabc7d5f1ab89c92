"""A version is served if it answers as in its test: the same, or in 16 bits as well."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Sequence

import httpx
import pytest

from qwen3ft.errors import ServedOtherwiseError
from qwen3ft.records.serving import EngineName
from qwen3ft.server.probe import Device, KeptAnswer, KeptTest, prove

ROWS = 100
SHORT, LONG = 8, 600
"""Tokens of an answer of a few words, and of one after thinking."""


def kept_test(answers: Sequence[str], device: Device = "cuda") -> KeptTest:
    """Return a test with these answers, to questions of which "right" is the answer."""
    kept = [
        KeptAnswer(
            [{"role": "user", "content": str(number)}],
            thinking=False,
            answer=answer,
            reference="right",
        )
        for number, answer in enumerate(answers)
    ]
    return KeptTest(kept, "exact_match", device)


def proven(
    test: KeptTest,
    served: Sequence[str],
    tokens: int = LONG,
    device: Device = "cuda",
    engine: EngineName = "own",
) -> str:
    """Prove a server that gives these answers."""

    def answer(request: httpx.Request) -> httpx.Response:
        number = int(json.loads(request.content)["messages"][0]["content"])
        message = {"message": {"content": served[number]}}
        usage = {"completion_tokens": tokens}
        return httpx.Response(200, json={"choices": [message], "usage": usage})

    async def ask() -> str:
        transport = httpx.MockTransport(answer)
        async with httpx.AsyncClient(transport=transport, base_url="http://x") as client:
            return await prove(client, "v1", test, False, engine, device, at_once=4)

    return asyncio.run(ask())


TESTED = ["right"] * 80 + ["wrong"] * 20
TURNED = ["Right!"] * 30 + ["wrong"] * 6 + ["right"] * 44 + ["right"] * 5 + ["wrong, too"] * 15
"""Another text in every second answer: 6 right ones become wrong, 5 wrong ones right."""


def test_near_ties_of_16_bits_do_not_refuse_a_champion() -> None:
    """Long answers part at one of hundreds of tokens; what counts is that they are as good."""
    likeness = proven(kept_test(TESTED), TURNED)
    assert likeness == "44 of 100 answers are the same; exact match 79.0%, there 80.0%"


def test_without_16_bits_the_answers_are_the_same() -> None:
    """One in fifty may differ, whatever its score is."""
    test = kept_test(TESTED, "cpu")
    proven(test, ["no"] * 2 + TESTED[2:], device="cpu")
    for engine, served in (("own", ["no"] * 3 + TESTED[3:]), ("vllm", TURNED)):
        with pytest.raises(ServedOtherwiseError, match="at least 98% have to be") as raised:
            proven(test, served, device="cpu", engine=engine)
        engine_to_try = {"own": "--probe-rows 0", "vllm": "--engine own"}[engine]
        assert raised.value.next_command == f"qwen3ft serve {engine_to_try}"
    proven(test, TURNED, device="cpu", engine="llama.cpp")  # which computes in 16 bits there too


@pytest.mark.parametrize(
    ("served", "tokens"),
    [
        (["Right!"] * 40 + TESTED[40:], SHORT),  # as good, but so many do not turn by themselves
        (["right"] * 60 + ["wrong"] * 40, LONG),
        (["wrong"] * 9 + TESTED[9:], LONG),  # none became better meanwhile
        (["(an error)"] * ROWS, 0),
    ],
    ids=["another adapter", "another prompt", "a few worse ones", "errors"],
)
def test_other_answers_are_refused_in_16_bits_too(served: list[str], tokens: int) -> None:
    """As many as chance does not turn, or worse ones."""
    with pytest.raises(ServedOtherwiseError, match="does not answer as in its test"):
        proven(kept_test(TESTED), served, tokens)


def test_with_few_rows_chance_explains_little() -> None:
    """Of ten, one may become worse."""
    proven(kept_test(["right"] * 10), ["wrong"] + ["right"] * 9)
    with pytest.raises(ServedOtherwiseError, match="by more than chance or"):
        proven(kept_test(["right"] * 10), ["wrong"] * 2 + ["right"] * 8)
