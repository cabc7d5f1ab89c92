"""Thinking budgets for transformers' `generate`, as the decoder keeps them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from qwen3ft.decoding.writing import AnswerLimits, Marks, Writing


class ThinkingBudget:
    """State of a batch: a logits processor, and a stopping criterion.

    Args:
        limits: Extent of each answer.
        marks: Token ids that steer the writing.
        device: Where the model is.
    """

    def __init__(self, limits: Sequence[AnswerLimits], marks: Marks, device: torch.device) -> None:
        self.most_tokens = max(one.most_tokens(marks) for one in limits)
        self._writing = Writing(len(limits), marks, 0, device)
        for slot, one in enumerate(limits):
            self._writing.begin(slot, one)

    @property
    def written(self) -> list[int]:
        """Tokens of each answer, the end token included."""
        counts: list[int] = self._writing.state["written"].tolist()
        return counts

    @property
    def cut(self) -> list[bool]:
        """True for each answer whose thinking was ended for the model."""
        return [count > 0 for count in self._writing.state["forced"].tolist()]

    def force(self, _: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        """Leave but one token to each answer whose thinking has to end."""
        forcing, token = self._writing.forced()
        wanted = torch.zeros_like(scores, dtype=torch.bool).scatter_(1, token[:, None], True)
        return scores.masked_fill(forcing[:, None] & ~wanted, float("-inf")).masked_fill(
            forcing[:, None] & wanted, 0.0
        )

    def watch(self, tokens: torch.Tensor, _: Any, **__: Any) -> torch.Tensor:
        """Take note of the newest tokens; return True for each answer that has ended."""
        forcing, _token = self._writing.forced()
        self._writing.advance(tokens[:, -1], forcing)
        return self._writing.state["ended"].clone()
