"""The form of an answer, whatever it says: what breaks first in a model that was trained badly.

Guarantees: pure functions of text. A check says nothing about content, so a base model passes them
as well as a tuned one, and only a share that falls is a sign.
Does not cover languages of one script: English and French look the same here, Chinese and English
do not.
"""

from __future__ import annotations

import unicodedata
from collections import Counter
from functools import lru_cache

from qwen3ft.chat.thinking import THINK_CLOSE, THINK_OPEN, split_thinking
from qwen3ft.evaluation.answers import Generated, Question, is_looping
from qwen3ft.evaluation.text_metrics import answer_tokens

STOPS = "stops by itself"
NOT_EMPTY = "not empty"
NO_LOOP = "no loops"
THINKING = "well-formed thinking"
LANGUAGE = "language of the question"
LENGTH = "length within bounds"

FORM_CHECKS = (STOPS, NOT_EMPTY, NO_LOOP, THINKING, LANGUAGE, LENGTH)

LONGEST_TIMES, LENGTH_SLACK_TOKENS = 4, 16
"""An answer may have four times the reference's tokens and 16 more, or a quarter less 16."""


def check_form(answer: Generated, question: Question, *, thinking: bool) -> dict[str, bool]:
    """Which of `FORM_CHECKS` the answer passes.

    Args:
        answer: What was written.
        question: With its reference, whose length and language are allowed too.
        thinking: Whether the model was asked to think first.
    """
    said = answer.answer
    return {
        STOPS: answer.stopped,
        NOT_EMPTY: bool(said),
        NO_LOOP: not is_looping(answer.text),
        THINKING: thinking_is_well_formed(answer.text, asked=thinking),
        LANGUAGE: language_fits(said, question),
        LENGTH: length_fits(said, question.reference),
    }


def thinking_is_well_formed(text: str, *, asked: bool) -> bool:
    """Whether `text` begins with one closed block if thinking was asked for, and has none if not.

    A model that cannot think fails where it was asked to, and so does its base.
    """
    opened, closed = text.count(THINK_OPEN), text.count(THINK_CLOSE)
    if not asked:
        return opened == closed == 0
    begins = text.lstrip().startswith(THINK_OPEN)
    return begins and opened == closed == 1 and bool(split_thinking(text)[0])


def language_fits(answer: str, question: Question) -> bool:
    """Whether the answer is in the script of the question or, as in translations, the reference.

    An answer without letters is in every language, an empty one in none.
    """
    script = main_script(answer)
    if script is None:
        return bool(answer)
    return script in {main_script(question.text), main_script(question.reference)}


def main_script(text: str) -> str | None:
    """The script of most letters ('LATIN', 'CJK', 'CYRILLIC', ...); None without letters.

    One Han character says about as much as a word, so it weighs as much as four letters.
    """
    weights: Counter[str] = Counter()
    for character in text:
        if character.isalpha():
            script = _script(character)
            weights[script] += 4 if script == "CJK" else 1
    return max(weights, key=lambda script: (weights[script], script)) if weights else None


@lru_cache(maxsize=4096)
def _script(character: str) -> str:
    return unicodedata.name(character, "UNKNOWN").partition(" ")[0]


def length_fits(answer: str, reference: str) -> bool:
    """Whether the answer is not many times longer or shorter than the reference."""
    given, wanted = len(answer_tokens(answer)), len(answer_tokens(reference))
    longest = wanted * LONGEST_TIMES + LENGTH_SLACK_TOKENS
    return wanted <= given * LONGEST_TIMES + LENGTH_SLACK_TOKENS and given <= longest
