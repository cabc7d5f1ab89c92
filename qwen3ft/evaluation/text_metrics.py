"""Similarity of an answer to its reference, 0 to 1: token F1 and chrF, in any script.

Both compare normalised texts, so reasoning does not count, and both are 1.0 where exact match holds
and the answer has a word. Neither sees meaning: a correct paraphrase scores low, and the right
words in another order score high in F1.
"""

from __future__ import annotations

import re
from collections import Counter
from functools import cache
from typing import Any

from qwen3ft.evaluation.answers import normalise

_UNSPACED = "\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\U00020000-\U0003ffff"
"""Kana and Han, written without spaces: each character is a token."""

_TOKEN = re.compile(rf"[{_UNSPACED}]|(?:(?![{_UNSPACED}])\w)+")


def answer_tokens(text: str) -> list[str]:
    """Split the normalised answer into words, and Chinese and Japanese text into characters."""
    return _TOKEN.findall(normalise(text))


def token_f1(answer: str, reference: str) -> float:
    """Return the harmonic mean of token precision and recall, as in SQuAD's evaluation.

    0 if either text has no token.
    """
    # SQuAD drops "a", "an", "the": a rule of English alone, which is not applied here.
    given, wanted = Counter(answer_tokens(answer)), Counter(answer_tokens(reference))
    shared = (given & wanted).total()
    return 2 * shared / (given.total() + wanted.total()) if shared else 0.0


def chrf(answer: str, reference: str) -> float:
    """Return sacreBLEU's chrF (Popović 2015): F2 over n-grams of up to six characters."""
    if not (given := normalise(answer)):
        return 0.0
    return float(_chrf().sentence_score(given, [normalise(reference)]).score) / 100


@cache
def _chrf() -> Any:
    from sacrebleu.metrics import CHRF

    return CHRF()
