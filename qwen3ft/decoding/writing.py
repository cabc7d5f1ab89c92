"""The next token of each answer, and its end: greedy or drawn, thinking within its budget.

When an answer has used up its tokens for thinking, the end of the thinking is written for the model
and it answers, as in Qwen3's documentation of thinking budgets. All answers advance together, on
the device; nothing waits for the host.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from qwen3ft.chat.thinking import THINK_CLOSE, THINK_OPEN

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

CLOSING_TEXT = f"\n{THINK_CLOSE}\n\n"
"""Written when the thinking budget is spent: the end of a think block as templates write it."""


@dataclass(frozen=True)
class Marks:
    """Token ids that steer the writing.

    Attributes:
        ends: End tokens.
        think_open: The opening tag, or -1 if it is not one token.
        think_close: The closing tag, or -1.
        closing: Tokens of `CLOSING_TEXT`; empty if the closing tag is not one token.
    """

    ends: tuple[int, ...]
    think_open: int = -1
    think_close: int = -1
    closing: tuple[int, ...] = ()

    @classmethod
    def of(cls, tokenizer: PreTrainedTokenizerBase, ends: Sequence[int]) -> Marks:
        """Return the marks of a tokenizer."""
        opening = tokenizer.encode(THINK_OPEN, add_special_tokens=False)
        closed = tokenizer.encode(THINK_CLOSE, add_special_tokens=False)
        closing = tokenizer.encode(CLOSING_TEXT, add_special_tokens=False)
        if len(opening) != 1 or len(closed) != 1 or closed[0] not in closing:
            return cls(tuple(sorted(ends)))
        return cls(tuple(sorted(ends)), opening[0], closed[0], tuple(closing))


@dataclass(frozen=True)
class AnswerLimits:
    """Extent of one answer.

    Attributes:
        answer_tokens: Most tokens outside of thinking, the end token included.
        thinking_tokens: Most tokens of thinking; 0 if the model must not think.
        opened: The prompt ends with the opening tag.
        seed: Seed of its draws, or None for greedy decoding.
        all_tokens: Most tokens of both together; None for no other limit.
        temperature: Divides the logits before a draw.
        top_p: Draws are among the likeliest tokens that together have this probability.
    """

    answer_tokens: int
    thinking_tokens: int = 0
    opened: bool = False
    seed: int | None = None
    all_tokens: int | None = None
    temperature: float = 1.0
    top_p: float = 1.0

    def most_tokens(self, marks: Marks) -> int:
        """Return the most tokens that are written."""
        most = self.answer_tokens + self.thinking_tokens + len(marks.closing)
        return most if self.all_tokens is None else min(most, self.all_tokens)


class Writing:
    """State of the answers in all slots, as tensors of one number each.

    Args:
        slots: Number of slots.
        marks: Token ids that steer the writing.
        most_draws: Most tokens of a drawn answer; 0 if none is drawn.
        device: Where they are.
        shaped: Draws heed temperature and top-p, which costs a sort of the vocabulary.
    """

    def __init__(
        self,
        slots: int,
        marks: Marks,
        most_draws: int,
        device: torch.device,
        *,
        shaped: bool = False,
    ) -> None:
        def numbers(kind: torch.dtype, *shape: int) -> Tensor:
            return torch.zeros(slots, *shape, dtype=kind, device=device)

        self.marks = marks
        self._ends = torch.tensor(marks.ends, device=device)
        self._closing = torch.tensor([*marks.closing, 0], device=device)
        self.state: dict[str, Tensor] = {
            "ended": torch.ones(slots, dtype=torch.bool, device=device),
            "opened": numbers(torch.bool),
            "closed": numbers(torch.bool),
            "written": numbers(torch.int64),
            "all_left": numbers(torch.int64),
            "answer_left": numbers(torch.int64),
            "thinking_left": numbers(torch.int64),
            "forced": numbers(torch.int64),
            "drawn": numbers(torch.bool),
            "draws": numbers(torch.float32, most_draws),
        }
        self.shaped = shaped
        if shaped:
            self.state |= {name: numbers(torch.float32) + 1 for name in ("temperature", "top_p")}

    def begin(self, slot: int, limits: AnswerLimits) -> None:
        """Begin an answer in `slot`."""
        state = self.state
        for name in ("ended", "written", "forced"):
            state[name][slot] = 0
        may_think = limits.thinking_tokens > 0 and bool(self.marks.closing)
        state["all_left"][slot] = limits.most_tokens(self.marks)
        state["opened"][slot] = limits.opened
        state["closed"][slot] = not may_think
        state["thinking_left"][slot] = limits.thinking_tokens
        # a tokenizer without tags has one budget for both
        state["answer_left"][slot] = limits.answer_tokens + (
            0 if may_think else limits.thinking_tokens
        )
        state["drawn"][slot] = limits.seed is not None
        if limits.seed is not None:
            if self.shaped:
                state["temperature"][slot], state["top_p"][slot] = limits.temperature, limits.top_p
            generator = torch.Generator().manual_seed(limits.seed)
            count = min(limits.most_tokens(self.marks), state["draws"].shape[1])
            state["draws"][slot, :count] = torch.rand(count, generator=generator).to(
                state["draws"].device
            )

    def forced(self) -> tuple[Tensor, Tensor]:
        """Return True for each answer whose next token is one of `CLOSING_TEXT`, and the token."""
        state, length = self.state, len(self.marks.closing)
        spent = state["opened"] & ~state["closed"] & (state["thinking_left"] <= 0)
        begun = (state["forced"] > 0) & (state["forced"] < length)
        return (spent | begun) & ~state["ended"], self._closing[state["forced"]]

    def choose(self, logits: Tensor, *, draw: bool) -> Tensor:
        """Return the next token of each answer, int64, and advance.

        Args:
            logits: fp32, (slots, vocabulary).
            draw: Some answers are drawn.
        """
        token = logits.argmax(-1)
        if draw:
            token = torch.where(self.state["drawn"], self._draw(logits), token)
        forcing, closing = self.forced()
        token = torch.where(forcing, closing, token)
        self.advance(token, forcing)
        return token

    def advance(self, token: Tensor, forcing: Tensor) -> None:
        """Take note of the `token` that each answer was continued with."""
        state, marks = self.state, self.marks
        going = ~state["ended"]
        thinking = state["opened"] & ~state["closed"]
        closes = going & (token == marks.think_close)
        state["thinking_left"] -= (going & thinking & ~forcing).long()
        state["answer_left"] -= (going & ~thinking & ~forcing).long()
        state["forced"] += forcing.long()
        state["closed"] |= closes
        state["opened"] |= going & (token == marks.think_open)
        state["written"] += going.long()
        state["all_left"] -= going.long()
        is_end = (token[:, None] == self._ends).any(-1)
        state["ended"] |= is_end | (state["answer_left"] <= 0) | (state["all_left"] <= 0)

    def _draw(self, logits: Tensor) -> Tensor:
        """Draw from softmax(logits) by inverting its distribution function."""
        written = self.state["written"].clamp(max=self.state["draws"].shape[1] - 1)
        draw = self.state["draws"].gather(1, written[:, None])
        if self.shaped:
            return self._draw_shaped(logits, draw)
        summed = logits.softmax(-1).cumsum_(-1)
        # in fp32 the sum may end below 1, and a draw beyond it would be the last token of all
        return (summed < draw * summed[:, -1:]).sum(-1).clamp_(max=logits.shape[1] - 1)

    def _draw_shaped(self, logits: Tensor, draw: Tensor) -> Tensor:
        """Draw at each slot's temperature, from its nucleus.

        That is the fewest likeliest tokens whose probability is at least top-p (Holtzman et al.
        2020, arXiv:1904.09751).
        """
        shares, tokens = (
            (logits / self.state["temperature"][:, None]).softmax(-1).sort(-1, descending=True)
        )
        summed = shares.cumsum(-1)
        in_nucleus = summed - shares < self.state["top_p"][:, None]
        # the nucleus has the whole probability: the draw is scaled to what it has
        mass = (shares * in_nucleus).sum(-1, keepdim=True)
        place = ((summed < draw * mass) & in_nucleus).sum(-1, keepdim=True)
        # at least 0: a top-p may be 0 in fp32
        place = torch.minimum(place, in_nucleus.sum(-1, keepdim=True) - 1).clamp_(min=0)
        return tokens.gather(1, place)[:, 0]
