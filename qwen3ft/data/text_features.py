"""Shingles, numbers, names and answers by which two question-answer texts are compared.

The comparison is symmetric and ignores case, punctuation and Unicode form, but never a number (in
digits, Chinese or English words) or a short answer. Names are found by capitals inside a sentence,
by 《》「」, and as Latin words in Chinese text; others are words like any other.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from qwen3ft.text.plain import normalized

# Answers up to this many words must be the same: they are labels and values.
SHORT_ANSWER_WORDS = 5

SEPARATOR = "\0"
"""Mark between question and answer; no row that passed the checks holds it."""

_HAN = "\u3040-\u30ff\u3400-\u9fff\uf900-\ufaff\U00020000-\U0003ffff"
_WORDS = re.compile(rf"[{_HAN}]|[^\W_{_HAN}]+")
_ASCII_WORDS = re.compile("[a-z0-9]+")
_HAS_DIGIT = re.compile("[0-9０-９]")
_LATIN = re.compile("[A-Za-z][A-Za-z0-9]*")
# A capital that follows no end of a sentence, colon, quote or list mark. Separators in
# a row are read once, from where they begin, or from one of the last few that is / or (.
_NAME = re.compile(
    r"(?:(?<=[^\s./(!?:;\"'*#>|•。！？：；“”…-])[ \t/(-]++|(?<=[/(])[ \t/(-]{1,16}+)"
    "([A-Z][A-Za-z0-9]*)"
)
_TITLE = re.compile("[《「『]([^》」』]{1,40})[》」』]")
# not 一 and "one", which are often no numbers
_NUMERALS = frozenset(
    [
        *"〇零二两三四五六七八九十百千万亿半",
        *("two", "three", "four", "five", "six", "seven", "eight", "nine", "ten", "eleven"),
        *("twelve", "thirteen", "fourteen", "fifteen", "sixteen", "seventeen", "eighteen"),
        *("nineteen", "twenty", "thirty", "forty", "fifty", "sixty", "seventy", "eighty"),
        *("ninety", "hundred", "thousand", "million", "billion", "half", "twice"),
    ]
)


def as_text(question: str, answer: str) -> str:
    """Return the text by which a row is compared."""
    return f"{question}{SEPARATOR}{answer}"


def sketch(text: str) -> tuple[list[str], str]:
    """Return the shingles of a text (at least one), and what a near-duplicate of it must share."""
    question, _, answer = text.partition(SEPARATOR)
    asked, answered = _words(question), _words(answer)
    shingles = _shingles(asked) + _shingles(answered) or [SEPARATOR]
    return shingles, _telling(text, asked + answered, answered)


@dataclass(frozen=True, slots=True)
class Features:
    """Everything that `are_near` compares."""

    shingles: frozenset[str]
    answer: frozenset[str]
    telling: str
    names: tuple[str, ...]
    text: str


def features(text: str) -> Features:
    """Return the features of a text of `as_text`."""
    question, _, answer = text.partition(SEPARATOR)
    asked, answered = _words(question), _words(answer)
    of_answer = _shingles(answered)
    return Features(
        shingles=frozenset(_shingles(asked) + of_answer),
        answer=frozenset(of_answer),
        telling=_telling(text, asked + answered, answered),
        names=(*_names(question, asked), *_names(answer, answered)),
        text=text.lower(),
    )


def are_near(one: Features, other: Features, threshold: float) -> bool:
    """Return whether both ask and answer the same, but for a few words.

    Their shingles and those of their answers have a Jaccard similarity of at least `threshold`,
    their numbers and short answers are equal, and each text holds the other's names.
    """
    return (
        one.telling == other.telling
        and jaccard(one.shingles, other.shingles) >= threshold
        and (one.answer == other.answer or jaccard(one.answer, other.answer) >= threshold)
        and all(name in other.text for name in one.names)
        and all(name in one.text for name in other.names)
    )


def jaccard(one: frozenset[str], other: frozenset[str]) -> float:
    """Return the size of the intersection over that of the union; 0 if both are empty."""
    common = len(one & other)
    return common / ((len(one) + len(other) - common) or 1)


def _words(text: str) -> list[str]:
    """Return words in lower case, Chinese characters one by one, without punctuation."""
    if text.isascii():
        return _ASCII_WORDS.findall(text.lower())  # twice as fast
    # in two steps: joined without punctuation, most texts pass NFKC's quick check
    words = " ".join(_WORDS.findall(normalized("NFC", text).lower()))
    return normalized("NFKC", words).split()


# Three words, or Chinese characters, in a row. An exchanged word spoils three of them: a template
# with another noun in it stays under 0.8 unless it has 29 words or more.
def _shingles(words: list[str]) -> list[str]:
    triples = map(" ".join, zip(words, words[1:], words[2:], strict=False))
    return list(triples) or ([" ".join(words)] if words else [])


def _telling(text: str, words: list[str], answer: list[str]) -> str:
    """Return the numbers, sorted, and a short answer."""
    found: list[str] = []
    if _HAS_DIGIT.search(text):
        # Most words are of letters alone, which costs less to find out.
        found = [word for word in words if not word.isalpha() and _HAS_DIGIT.search(word)]
    if not _NUMERALS.isdisjoint(words):
        found += [word for word in words if word in _NUMERALS]
    found.sort()
    short = answer if len(answer) <= SHORT_ANSWER_WORDS else []
    return " ".join(found) + SEPARATOR + " ".join(short)


def _names(text: str, words: list[str]) -> list[str]:
    """Return the names in the text, in lower case."""
    latin = _LATIN.findall(text)
    in_chinese = not text.isascii() and 2 * len(latin) < len(words)
    found = latin if in_chinese else _NAME.findall(text)
    return [name.lower() for name in (*found, *_TITLE.findall(text))]
