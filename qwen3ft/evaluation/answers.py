"""Questions and answers: exact match, loops, and the choice of questions and of samples to show.

Everything is deterministic and works in any script. Exact match sees no meaning: a correct answer
in other words counts as wrong, and so does '1000' for '1,000'.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from difflib import SequenceMatcher
from hashlib import sha256
from itertools import chain, combinations, zip_longest
from typing import TypeVar

from qwen3ft.chat.thinking import split_thinking
from qwen3ft.records.evaluation import ModelLabel, SideBySide
from qwen3ft.text.plain import normalized

# a sound model has an odd answer now and then; a broken one has many
MIN_NOT_EMPTY_SHARE = 0.95
MIN_NOT_LOOPING_SHARE = 0.95

LOOP_MIN_REPEATS = 4
LOOP_MIN_BYTES = 24
"""Shortest loop in UTF-8 bytes: 24 Latin letters, or 8 Chinese characters, are about four words."""
LOOP_MAX_UNIT_CHARACTERS = 2000

MAX_SAMPLES = 20
COMPARED_CHARACTERS = 400

_FINAL_PUNCTUATION = ".。!?,;:、…"

_Item = TypeVar("_Item")


@dataclass(frozen=True)
class Question:
    """One held-out question with its reference answer; `split` groups questions of one kind."""

    text: str
    reference: str
    split: str = "test"


@dataclass(frozen=True)
class Generated:
    """A model's output.

    `text` has no special tokens. If the prompt opened the thinking block, it begins with that tag,
    so that a block that was never closed is not taken for an answer.
    """

    text: str
    stopped: bool
    """True if it ended with the end token, False if it was cut off at the limit."""
    tokens: int
    """Number of tokens generated, including the end token."""
    thinking_cut: bool = False
    """True if the end of the thinking was written for the model, whose budget was spent."""

    @property
    def answer(self) -> str:
        """The text after the reasoning."""
        return split_thinking(self.text)[1]


def normalise(text: str) -> str:
    """Return the answer in `text` in the form that is compared.

    Drops the reasoning, applies NFKC and casefolding, collapses white space and strips final
    punctuation (unless nothing else is there).
    """
    answer = normalized("NFKC", split_thinking(text)[1])
    folded = " ".join(normalized("NFKC", answer.casefold()).split())
    return folded.rstrip(_FINAL_PUNCTUATION + " ") or folded


def exact_match(answer: str, reference: str) -> bool:
    """Return True if both are equal once normalised; an empty answer never matches."""
    # Strict on purpose: any tolerance for wording would also forgive wrong numbers and units.
    normalised = normalise(answer)
    return bool(normalised) and normalised == normalise(reference)


def is_looping(text: str) -> bool:
    """Return True if `text` ends in one piece of text repeated over and over.

    A loop is a unit of up to 2,000 characters that fills the tail at least four times and at least
    24 bytes; its last turn may be cut off. A loop that changes every turn, such as a numbered list
    of the same item, is not found.
    """
    tail = " ".join(text.split())
    for unit in range(1, min(len(tail) // LOOP_MIN_REPEATS, LOOP_MAX_UNIT_CHARACTERS) + 1):
        length = _periodic_tail(tail, unit)
        long_enough = len(tail[-length:].encode(errors="replace")) >= LOOP_MIN_BYTES
        if length >= LOOP_MIN_REPEATS * unit and long_enough:
            return True
    return False


def _periodic_tail(text: str, unit: int) -> int:
    """Return the length in characters of the longest tail of `text` with period `unit`."""
    start = len(text) - 1
    while start >= unit and text[start] == text[start - unit]:
        start -= 1
    return len(text) - 1 - start + unit


def answers_are_sound(answers: Sequence[str]) -> bool:
    """Return True if 95 % of the answers are not empty and 95 % do not loop; False for none."""
    return bool(answers) and (
        share(not split_thinking(text)[1] for text in answers) <= 1 - MIN_NOT_EMPTY_SHARE
        and share(is_looping(text) for text in answers) <= 1 - MIN_NOT_LOOPING_SHARE
    )


def choose_questions(questions: Sequence[Question], limit: int) -> list[int]:
    """Return ascending indices of at most `limit` questions, split by split in proportion."""
    if len(questions) <= limit:
        return list(range(len(questions)))
    groups = group_by(range(len(questions)), lambda index: questions[index].split)
    quotas = _proportional({split: len(group) for split, group in groups.items()}, limit)
    ranks = [sha256(question.text.encode()).digest() for question in questions]
    chosen: list[int] = []
    for split, group in groups.items():
        # By hash, not at random: a file that grows changes as few of the chosen ones as possible.
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
    """Return every model's text, question by question."""
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
    """Return up to `limit` pairs where the models differ most, taken from the splits in turn.

    Their difference is the mean over each two of base, champion and candidate, so a question that
    all three answer differently comes before one where only one differs.
    """
    groups = group_by(pairs, lambda pair: pair.split)
    ranked = [sorted(groups[split], key=_difference_rank) for split in sorted(groups)]
    in_turn = chain.from_iterable(zip_longest(*ranked))
    return [pair for pair in in_turn if pair is not None][:limit]


def _difference_rank(pair: SideBySide) -> tuple[float, str]:
    """Return a sort key: most different answers first, ties by question."""
    given = (pair.base, pair.candidate, pair.champion)
    compared = [normalise(text)[:COMPARED_CHARACTERS] for text in given if text is not None]
    likeness = [_likeness(*two) for two in combinations(compared, 2)]
    return sum(likeness) / len(likeness), pair.question


def _likeness(one: str, other: str) -> float:
    if one == other:
        return 1.0  # the common case, and comparing takes quadratic time
    return SequenceMatcher(None, one, other, autojunk=False).ratio()


def group_by(items: Iterable[_Item], key: Callable[[_Item], str]) -> dict[str, list[_Item]]:
    """Group the items by `key`, each group in order."""
    groups: dict[str, list[_Item]] = {}
    for item in items:
        groups.setdefault(key(item), []).append(item)
    return groups


def share(values: Iterable[bool]) -> float:
    """Return the share of true values, 0 to 1; 0 if there are none."""
    collected = list(values)
    return sum(collected) / len(collected) if collected else 0.0
