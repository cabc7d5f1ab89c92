"""Cases of the answers benchmark: prompts, and the lengths of their answers."""

from __future__ import annotations

import math
import random
from dataclasses import dataclass

FIRST_TOKEN, TOKENS = 10, 500
"""Bounds of the drawn token ids, [first, tokens): in every vocabulary, and never padding."""

SHORTEST_PROMPT, LONGEST_PROMPT = 40, 140
SHORTEST_ANSWER = 8
MEDIAN_SHARE, SIGMA = 0.5, 0.6
"""Answer lengths are lognormal: their median as a share of the most, and the logarithm's sigma."""


@dataclass(frozen=True)
class Case:
    """Questions for one model shape under one memory cap (GB of 2**30 bytes)."""

    shape: str
    cap_gb: float
    new_tokens: int
    questions: int = 600
    models: int = 1
    """Models that answer each question: the base, then adapters; one is the first adapter alone."""

    @property
    def name(self) -> str:
        """Name that no other case has."""
        models = "" if self.models == 1 else f" x {self.models} models"
        return f"{self.shape}, {self.cap_gb:g} GB, {self.questions}{models}, {self.new_tokens} new"


def prompts(case: Case, seed: int) -> list[tuple[list[int], int]]:
    """Return each question's token ids and the length of its answer.

    A random model ends no answer by itself, so each is ended at a length drawn beforehand.
    """
    draw = random.Random(seed)
    found = []
    for _ in range(case.questions):
        ids = [
            draw.randrange(FIRST_TOKEN, TOKENS)
            for _ in range(draw.randint(SHORTEST_PROMPT, LONGEST_PROMPT))
        ]
        found.append((ids, draw_length(draw, case.new_tokens)))
    return found


def draw_length(draw: random.Random, new_tokens: int) -> int:
    """Draw the length of an answer of at most `new_tokens` tokens."""
    length = draw.lognormvariate(math.log(MEDIAN_SHARE * new_tokens), SIGMA)
    return int(min(new_tokens, max(SHORTEST_ANSWER, length)))


def parse_case(text: str) -> Case:
    """Parse `SHAPE:CAP:NEW[:QUESTIONS[:MODELS]]`, such as 4b:13:256 or 4b:13:256:200:3.

    Raises:
        ValueError: the text has another form.
    """
    shape, cap, *numbers = text.lower().split(":")
    return Case(shape, float(cap), *map(int, numbers))
