"""Limits of one answer, counted on the host: as `qwen3ft.decoding.writing` counts on the device."""

from __future__ import annotations

from collections.abc import Sequence

from qwen3ft.decoding.writing import AnswerLimits, Marks


class Tally:
    """The tokens of one answer and what is left of its limits.

    Args:
        limits: The limits.
        marks: Token ids that steer the writing.
    """

    def __init__(self, limits: AnswerLimits, marks: Marks) -> None:
        self._marks = marks
        may_think = limits.thinking_tokens > 0 and bool(marks.closing)
        self.tokens: list[int] = []
        self.all_left = limits.most_tokens(marks)
        self._opened, self._closed = limits.opened, not may_think
        self._thinking_left = limits.thinking_tokens
        # a tokenizer without tags has one budget for both
        self._answer_left = limits.answer_tokens + (0 if may_think else limits.thinking_tokens)

    @property
    def is_over(self) -> bool:
        """True once the answer has ended or used up its tokens."""
        ended = bool(self.tokens) and self.tokens[-1] in self._marks.ends
        return ended or self._answer_left <= 0 or self.all_left <= 0

    @property
    def is_thinking_spent(self) -> bool:
        """True if the end of the thinking has to be written for the model."""
        return self._opened and not self._closed and self._thinking_left <= 0 and not self.is_over

    def take(self, tokens: Sequence[int]) -> list[int]:
        """Add tokens of the model; return those that are within the limits."""
        before = len(self.tokens)
        for token in tokens:
            if self.is_over or self.is_thinking_spent:
                break
            if self._opened and not self._closed:
                self._thinking_left -= 1
            else:
                self._answer_left -= 1
            self._add(token)
        return self.tokens[before:]

    def close_thinking(self) -> list[int]:
        """Write the end of the thinking; return its tokens, as far as there is room."""
        closing = self._marks.closing[: self.all_left]
        for token in closing:
            self._add(token)
        return list(closing)

    def _add(self, token: int) -> None:
        self.tokens.append(token)
        self._closed |= token == self._marks.think_close
        self._opened |= token == self._marks.think_open
        self.all_left -= 1
