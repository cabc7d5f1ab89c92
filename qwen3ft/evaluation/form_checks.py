"""Checks of an answer's form, which breaks first in a model that was trained badly.

They say nothing about content: a base model passes them like a tuned one, and only a share that
falls is a sign. Languages are told apart by script alone, so English and French look the same.
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
ENDS_THINKING = "ends its thinking"
LANGUAGE = "language of the question"
LENGTH = "length within bounds"

FORM_CHECKS = (STOPS, NOT_EMPTY, NO_LOOP, THINKING, ENDS_THINKING, LANGUAGE, LENGTH)

LONGEST_TIMES, LENGTH_SLACK_TOKENS = 4, 16
"""Bounds of the length: 4 times the reference plus 16 tokens, or the reverse."""


def check_form(answer: Generated, question: Question, *, thinking: bool) -> dict[str, bool]:
    """Return {check: passed} for each of `FORM_CHECKS`.

    Args:
        answer: The model's output.
        question: Its reference sets the bounds of length and language.
        thinking: True if the model was asked to think first.
    """
    said = answer.answer
    return {
        STOPS: answer.stopped,
        NOT_EMPTY: bool(said),
        NO_LOOP: not is_looping(answer.text),
        THINKING: thinking_is_well_formed(answer.text, asked=thinking),
        # What its budget ends would go on without one, however right the answer after it is.
        ENDS_THINKING: not answer.thinking_cut,
        LANGUAGE: language_fits(said, question),
        LENGTH: length_fits(said, question.reference),
    }


def thinking_is_well_formed(text: str, *, asked: bool) -> bool:
    """Return True if `text` begins with one closed thinking block if asked, else has none."""
    opened, closed = text.count(THINK_OPEN), text.count(THINK_CLOSE)
    if not asked:
        return opened == closed == 0
    begins = text.lstrip().startswith(THINK_OPEN)
    return begins and opened == closed == 1 and bool(split_thinking(text)[0])


def language_fits(answer: str, question: Question) -> bool:
    """Return True if the answer is in the script of the question or, for translations, reference.

    An answer without letters fits every language, an empty one fits none.
    """
    script = main_script(answer)
    if script is None:
        return bool(answer)
    return script in {main_script(question.text), main_script(question.reference)}


def main_script(text: str) -> str | None:
    """Return the script of most letters ('LATIN', 'CJK', 'CYRILLIC', ...); None without letters."""
    weights: Counter[str] = Counter()
    for character in text:
        if character.isalpha():
            script = _script(character)
            weights[script] += 4 if script == "CJK" else 1  # one Han character is about a word
    return max(weights, key=lambda script: (weights[script], script)) if weights else None


@lru_cache(maxsize=4096)
def _script(character: str) -> str:
    return unicodedata.name(character, "UNKNOWN").partition(" ")[0]


def length_fits(answer: str, reference: str) -> bool:
    """Return True if the answer is not many times longer or shorter than the reference."""
    given, wanted = len(answer_tokens(answer)), len(answer_tokens(reference))
    longest = wanted * LONGEST_TIMES + LENGTH_SLACK_TOKENS
    return wanted <= given * LONGEST_TIMES + LENGTH_SLACK_TOKENS and given <= longest
