"""Parts that all engines share: limits counted on the host, and the choice of an engine."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Literal

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from qwen3ft.decoding.writing import AnswerLimits, Marks, Writing
from qwen3ft.server import choice
from qwen3ft.server.choice import choose_engine
from qwen3ft.serving.engines.tally import Tally

END, OPEN, CLOSE, NEWLINE, WORD = range(5)
MARKS = Marks((END,), OPEN, CLOSE, (NEWLINE, CLOSE, NEWLINE))
WITHOUT_TAGS = Marks((END,))


def written_by_the_decoder(limits: AnswerLimits, marks: Marks, said: list[int]) -> list[int]:
    """Return the tokens of an answer whose model would say `said`, and then words."""
    writing = Writing(1, marks, 0, torch.device("cpu"))
    writing.begin(0, limits)
    tokens: list[int] = []
    while not writing.state["ended"].item():
        forcing, closing = writing.forced()
        spoken = said[len(tokens)] if len(tokens) < len(said) else WORD
        token = torch.where(forcing, closing, torch.tensor([spoken]))
        writing.advance(token, forcing)
        tokens.append(int(token))
    return tokens


def written_by_a_program(limits: AnswerLimits, marks: Marks, said: list[int]) -> list[int]:
    """Return the tokens that are relayed of a program that says the same, three at a time."""
    tally = Tally(limits, marks)
    while not tally.is_over:
        start = len(tally.tokens)
        tally.take([*said, *[WORD] * 99][start : start + 3])
        if tally.is_thinking_spent:
            tally.close_thinking()
    return tally.tokens


@given(
    st.builds(
        AnswerLimits,
        answer_tokens=st.integers(1, 6),
        thinking_tokens=st.integers(0, 4),
        opened=st.booleans(),
        all_tokens=st.none() | st.integers(1, 12),
    ),
    st.sampled_from((MARKS, WITHOUT_TAGS)),
    st.lists(st.integers(END, WORD), max_size=14),
)
def test_an_answer_that_is_relayed_ends_where_the_decoder_ends_it(
    limits: AnswerLimits, marks: Marks, said: list[int]
) -> None:
    """Whatever the model says: thinking within its budget, its end, and every limit."""
    relayed = written_by_a_program(limits, marks, said)
    assert relayed == written_by_the_decoder(limits, marks, said)


@pytest.mark.parametrize(
    ("has_vllm", "has_gguf", "device", "chosen"),
    [
        (True, True, "cuda", "vllm"),
        (True, False, "cpu", "vllm"),
        (False, True, "cpu", "llama.cpp"),
        (False, True, "cuda", "own"),
        (False, False, "cpu", "own"),
    ],
)
def test_the_engine_is_chosen_by_what_is_installed(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    has_vllm: bool,
    has_gguf: bool,
    device: Literal["cuda", "cpu"],
    chosen: str,
) -> None:
    """The reason names it; an engine that somebody names is taken as it is."""
    if has_vllm:
        program = tmp_path / "vllm"
        program.write_text("#!/bin/sh\n")
        program.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr(sys, "executable", "/nowhere/python")
    monkeypatch.setattr(choice, "missing_gguf_packages", lambda: [] if has_gguf else ["gguf"])
    name, why = choose_engine("auto", device)
    assert name == chosen
    assert (str(tmp_path) in why) is has_vllm
    assert choose_engine("own", device) == ("own", "as --engine says")
