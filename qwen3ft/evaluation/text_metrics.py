"""How near an answer is to its reference, 0 to 1, for answers that may be right in other words.

Guarantees: pure functions of text, for any script; 1.0 wherever `quality.exact_match` holds and the
answer has a word. Both compare what `quality.normalise` leaves, so thinking does not count.
Does not cover meaning: an answer in words of its own scores low, and the same words in another
order score high in F1.
"""

from __future__ import annotations

import re
from collections import Counter
from functools import cache
from typing import Any

from qwen3ft.evaluation.answers import normalise

_UNSPACED = "\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\U00020000-\U0003ffff"
"""Kana and Han: written without spaces, so each character is a token."""

_TOKEN = re.compile(rf"[{_UNSPACED}]|(?:(?![{_UNSPACED}])\w)+")


def answer_tokens(text: str) -> list[str]:
    """Words of the normalised answer, punctuation left out; of Chinese and Japanese, characters."""
    return _TOKEN.findall(normalise(text))


def token_f1(answer: str, reference: str) -> float:
    """Harmonic mean of precision and recall over the tokens of both, as in SQuAD's evaluation.

    Unlike there, articles count (they are English alone). 0 if either has no token.
    """
    given, wanted = Counter(answer_tokens(answer)), Counter(answer_tokens(reference))
    shared = (given & wanted).total()
    return 2 * shared / (given.total() + wanted.total()) if shared else 0.0


def chrf(answer: str, reference: str) -> float:
    """The chrF (Popović 2015) of sacreBLEU: F2 over n-grams of up to six characters, no spaces."""
    if not (given := normalise(answer)):
        return 0.0
    return float(_chrf().sentence_score(given, [normalise(reference)]).score) / 100


@cache
def _chrf() -> Any:
    from sacrebleu.metrics import CHRF

    return CHRF()
