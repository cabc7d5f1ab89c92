"""What an answer is worth: comparison with a reference, signs of a broken model, what to look at.

Guarantees: pure functions of text, for any script; the same answers always give the same judgement,
the same questions and the same samples. Exact match is strict about content: '1,000' is not '1000'.
Does not cover meaning (a right answer in other words counts as wrong), nor loops that change on
every turn, such as a numbered list of the same item.
"""

from __future__ import annotations

import unicodedata
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from difflib import SequenceMatcher
from hashlib import sha256
from itertools import chain, combinations, zip_longest
from typing import TypeVar

from qwen3ft.chat.thinking import split_thinking
from qwen3ft.records.evaluation import ModelLabel, SideBySide

MIN_NOT_EMPTY_SHARE = 0.95
MIN_NOT_LOOPING_SHARE = 0.95

LOOP_MIN_REPEATS = 4
LOOP_MIN_BYTES = 24
"""UTF-8 bytes: eight Chinese characters weigh as much as 24 Latin letters, about four words."""
LOOP_MAX_UNIT_CHARACTERS = 2000

MAX_SAMPLES = 20
COMPARED_CHARACTERS = 400

_FINAL_PUNCTUATION = ".。!?,;:、…"

_Item = TypeVar("_Item")


@dataclass(frozen=True)
class Question:
    """One held-out question with its right answer; `split` groups questions of one kind."""

    text: str
    reference: str
    split: str = "test"


@dataclass(frozen=True)
class Generated:
    """What a model wrote.

    `text` has no special tokens. Where the prompt itself opened the thinking block, it begins with
    that tag, so that a block which was never closed can be told from an answer.
    """

    text: str
    stopped: bool
    """Whether it ended with the end token, within the limit."""
    tokens: int
    """Tokens generated, the end token included."""

    @property
    def answer(self) -> str:
        """The text after the thinking."""
        return split_thinking(self.text)[1]


def normalise(text: str) -> str:
    """The answer in `text`, in the form that is compared.

    Drops the thinking, applies NFKC and casefolding, collapses white space and strips final
    punctuation (unless nothing else is there).
    """
    answer = unicodedata.normalize("NFKC", split_thinking(text)[1])
    folded = " ".join(unicodedata.normalize("NFKC", answer.casefold()).split())
    return folded.rstrip(_FINAL_PUNCTUATION + " ") or folded


def exact_match(answer: str, reference: str) -> bool:
    """Whether both are the same text once normalised; an empty answer never matches."""
    normalised = normalise(answer)
    return bool(normalised) and normalised == normalise(reference)


def is_looping(text: str) -> bool:
    """Whether the end of `text` is one piece of text, over and over.

    True when a unit of up to 2000 characters fills the tail at least four times and at least 24
    bytes; the last turn may be cut short. Compares characters, so it works without spaces.
    """
    tail = " ".join(text.split())
    for unit in range(1, min(len(tail) // LOOP_MIN_REPEATS, LOOP_MAX_UNIT_CHARACTERS) + 1):
        length = _periodic_tail(tail, unit)
        long_enough = len(tail[-length:].encode(errors="replace")) >= LOOP_MIN_BYTES
        if length >= LOOP_MIN_REPEATS * unit and long_enough:
            return True
    return False


def _periodic_tail(text: str, unit: int) -> int:
    """Length in characters of the longest end of `text` that has the period `unit`."""
    start = len(text) - 1
    while start >= unit and text[start] == text[start - unit]:
        start -= 1
    return len(text) - 1 - start + unit


def answers_are_sound(answers: Sequence[str]) -> bool:
    """Whether enough answers are not empty (95 %) and do not loop (95 %); False for none."""
    return bool(answers) and (
        share(not split_thinking(text)[1] for text in answers) <= 1 - MIN_NOT_EMPTY_SHARE
        and share(is_looping(text) for text in answers) <= 1 - MIN_NOT_LOOPING_SHARE
    )


def choose_questions(questions: Sequence[Question], limit: int) -> list[int]:
    """Indices of at most `limit` questions, ascending, spread over the splits in proportion.

    Within a split the choice follows a hash of the question, so a file that grows changes as few
    of the chosen questions as possible.
    """
    if len(questions) <= limit:
        return list(range(len(questions)))
    groups = group_by(range(len(questions)), lambda index: questions[index].split)
    quotas = _proportional({split: len(group) for split, group in groups.items()}, limit)
    ranks = [sha256(question.text.encode()).digest() for question in questions]
    chosen: list[int] = []
    for split, group in groups.items():
        chosen += sorted(group, key=lambda index: ranks[index])[: quotas[split]]
    return sorted(chosen)


def _proportional(sizes: Mapping[str, int], limit: int) -> dict[str, int]:
    """Share `limit` out in proportion to `sizes` by largest remainders (Hamilton's method)."""
    total = sum(sizes.values())
    quotas = {name: size * limit // total for name, size in sizes.items()}
    by_remainder = sorted(sizes, key=lambda name: (-(sizes[name] * limit % total), name))
    for name in by_remainder[: limit - sum(quotas.values())]:
        quotas[name] += 1
    return quotas


def side_by_side(
    questions: Sequence[Question], answers: Mapping[ModelLabel, Sequence[Generated]]
) -> list[SideBySide]:
    """What each model wrote, question by question."""
    by_label = {label: [answer.text for answer in given] for label, given in answers.items()}
    champion: Sequence[str | None] = by_label.get("champion") or [None] * len(questions)
    return [
        SideBySide(
            question=question.text,
            reference=question.reference,
            base=by_label["base"][index],
            candidate=by_label["candidate"][index],
            champion=champion[index],
            split=question.split,
        )
        for index, question in enumerate(questions)
    ]


def choose_samples(pairs: Sequence[SideBySide], limit: int = MAX_SAMPLES) -> list[SideBySide]:
    """Up to `limit` pairs where the models differ most, taken from the splits in turn.

    How much they differ is the mean over base, champion and candidate, two at a time; a question
    that only one of them answers differently comes after one that all answer differently.
    """
    groups = group_by(pairs, lambda pair: pair.split)
    ranked = [sorted(groups[split], key=_difference_rank) for split in sorted(groups)]
    in_turn = chain.from_iterable(zip_longest(*ranked))
    return [pair for pair in in_turn if pair is not None][:limit]


def _difference_rank(pair: SideBySide) -> tuple[float, str]:
    """Sorts the most different answers first; ties by the question."""
    given = (pair.base, pair.candidate, pair.champion)
    compared = [normalise(text)[:COMPARED_CHARACTERS] for text in given if text is not None]
    likeness = [_likeness(*two) for two in combinations(compared, 2)]
    return sum(likeness) / len(likeness), pair.question


def _likeness(one: str, other: str) -> float:
    """0 to 1; what is equal costs nothing to compare."""
    if one == other:
        return 1.0
    return SequenceMatcher(None, one, other, autojunk=False).ratio()


def group_by(items: Iterable[_Item], split: Callable[[_Item], str]) -> dict[str, list[_Item]]:
    """The items by what `split` says of them, each group in order."""
    groups: dict[str, list[_Item]] = {}
    for item in items:
        groups.setdefault(split(item), []).append(item)
    return groups


def share(values: Iterable[bool]) -> float:
    """How many of the values are true, 0 to 1; 0 for none."""
    collected = list(values)
    return sum(collected) / len(collected) if collected else 0.0
