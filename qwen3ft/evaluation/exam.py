"""One model's exam: held-out questions and the ability set, answered from the cache or anew.

What was computed is saved before the next model is asked.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from qwen3ft.chat.rendering import ChatRow
from qwen3ft.evaluation.answer_cache import AnswerCache, answer_key, new_entry
from qwen3ft.evaluation.answer_loss import RowLoss, answer_losses
from qwen3ft.evaluation.answers import Generated, Question, choose_questions
from qwen3ft.evaluation.generation import answer_questions
from qwen3ft.planning.answers import SAMPLED_QUESTIONS

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

SAMPLING_SEED = 0

Beat = Callable[[str, int], None]


@dataclass(frozen=True)
class Exam:
    """The questions for every model, and how they are asked."""

    rows: Sequence[ChatRow]
    """Held-out rows: they are answered, and the loss of their references is measured."""
    ability: Sequence[ChatRow]
    """General rows: only their loss is measured."""
    batch_size: int
    max_new_tokens: int
    max_thinking_tokens: int
    escape: bool
    may_think: bool = True
    """The model's chat template writes reasoning."""

    @property
    def questions(self) -> list[Question]:
        """The held-out rows as questions to score."""
        return [to_question(row) for row in self.rows]

    @property
    def thinking(self) -> list[bool]:
        """True for each held-out row with reasoning in its reference: the model may think first."""
        return [self.asks_to_think(row) for row in self.rows]

    def asks_to_think(self, row: ChatRow) -> bool:
        """Return True if models may think before they answer this row."""
        return self.may_think and bool(row.get("reasoning"))

    @property
    def sampled(self) -> list[int]:
        """Indices of the held-out rows that are also answered by sampling, from every split."""
        return choose_questions(self.questions, SAMPLED_QUESTIONS)

    def part(self, rows: Sequence[int]) -> Exam:
        """Return the exam with these of its held-out rows alone."""
        return replace(self, rows=[self.rows[index] for index in rows])

    def keys(self) -> tuple[list[str], list[str], list[str]]:
        """Return the cache keys of the held-out, the sampled and the ability rows."""
        answered = {
            "max_new_tokens": self.max_new_tokens,
            "max_thinking_tokens": self.max_thinking_tokens,
            "escape": self.escape,
            **({} if self.may_think else {"may_think": False}),
        }
        loss_alone = {"escape": self.escape}
        drawn = {**answered, "sampling_seed": SAMPLING_SEED}
        return (
            [answer_key(row, answered) for row in self.rows],
            [answer_key(self.rows[index], drawn) for index in self.sampled],
            [answer_key(row, loss_alone) for row in self.ability],
        )


@dataclass(frozen=True)
class Evaluated:
    """One model's results, in the order of the exam's rows."""

    answers: list[Generated]
    losses: list[RowLoss]
    sampled: list[Generated]
    """Sampled answers to the exam's `sampled` rows."""
    ability: list[RowLoss]
    generated: int
    """Number of answers that were not in the cache."""


class Evaluation:
    """One model's exam."""

    def __init__(self, exam: Exam, cache: AnswerCache) -> None:
        self.exam, self.cache = exam, cache
        self.keys, self.sampled_keys, self.ability_keys = exam.keys()
        self.missing = self._unknown(self.keys, exam.rows)
        sampled = [exam.rows[index] for index in exam.sampled]
        self.missing_sampled = self._unknown(self.sampled_keys, sampled)
        self.missing_ability = self._unknown(self.ability_keys, exam.ability)

    def _unknown(self, keys: Sequence[str], rows: Sequence[ChatRow]) -> dict[str, ChatRow]:
        """Return the rows to compute by key; a row that occurs twice is computed once."""
        found = dict(zip(keys, rows, strict=True))
        return {key: row for key, row in found.items() if self.cache.get(key) is None}

    @property
    def is_complete(self) -> bool:
        """True if everything is in the cache, so the model need not be loaded."""
        return not (self.missing or self.missing_sampled or self.missing_ability)

    def known_tokens(self) -> list[int]:
        """Return the lengths of the answers that are known, drawn ones too."""
        entries = [self.cache.get(key) for key in (*self.keys, *self.sampled_keys)]
        return [entry.generated.tokens for entry in entries if entry is not None]

    def compute(
        self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, label: str, beat: Beat
    ) -> None:
        """Compute and cache what is missing.

        Args:
            model: In eval mode, with the adapter of this exam active.
            tokenizer: Must have a padding token.
            label: First word of the phase that is passed to `beat`.
            beat: Called with the phase and the number of rows done.

        Raises:
            OutOfMemoryError: not even one question fits.
            TokenizerError: the chat template cannot be used.
        """
        exam = self.exam

        def losses(rows: Sequence[ChatRow], phase: str) -> list[RowLoss]:
            return answer_losses(
                model,
                tokenizer,
                rows,
                exam.batch_size,
                lambda done: beat(f"{label} {phase}", done),
                escape=exam.escape,
            )

        def answers(rows: Sequence[ChatRow], phase: str, seed: int | None) -> list[Generated]:
            return answer_questions(
                model,
                tokenizer,
                rows,
                batch_size=exam.batch_size,
                max_new_tokens=exam.max_new_tokens,
                max_thinking_tokens=exam.max_thinking_tokens,
                thinking=[exam.asks_to_think(row) for row in rows],
                progress=lambda done: beat(f"{label} {phase}", done),
                escape=exam.escape,
                sampling_seed=seed,
            )

        rows = list(self.missing.values())
        greedy, known = answers(rows, "answers", None), losses(rows, "loss")
        drawn = answers(list(self.missing_sampled.values()), "samples", SAMPLING_SEED)
        self.keep(greedy, known, drawn, losses(list(self.missing_ability.values()), "ability"))

    def keep(
        self,
        greedy: Sequence[Generated],
        losses: Sequence[RowLoss],
        drawn: Sequence[Generated],
        ability: Sequence[RowLoss],
    ) -> None:
        """Cache all that was missing, each in the order of the missing rows."""
        answered = zip(self.missing, greedy, losses, strict=True)
        self.cache.add(new_entry(key, answer, loss) for key, answer, loss in answered)
        sampled = zip(self.missing_sampled, drawn, strict=True)
        self.cache.add(new_entry(key, answer, RowLoss(0.0, 0)) for key, answer in sampled)
        general = zip(self.missing_ability, ability, strict=True)
        self.cache.add(new_entry(key, None, loss) for key, loss in general)
        self.cache.save()

    def results(self) -> Evaluated:
        """Return all results; call it once `is_complete`."""
        known = [self.cache[key] for key in self.keys]
        return Evaluated(
            answers=[entry.generated for entry in known],
            losses=[entry.loss for entry in known],
            sampled=[self.cache[key].generated for key in self.sampled_keys],
            ability=[self.cache[key].loss for key in self.ability_keys],
            generated=len(self.missing),
        )


def to_question(row: ChatRow) -> Question:
    """Return a held-out row as a question to score."""
    return Question(row["question"], row["answer"], row.get("split") or row.get("kind") or "test")
