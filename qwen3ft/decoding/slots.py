"""Slots: which answer is where, its pages, and moving it out of the GPU's memory and back."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from qwen3ft.decoding.attention import Slots
from qwen3ft.decoding.cache import PagedCache, pages_for
from qwen3ft.decoding.projections import BASE
from qwen3ft.decoding.writing import AnswerLimits, Marks, Writing


@dataclass
class Query:
    """One question for one model.

    Attributes:
        ids: Token ids of the prompt.
        model: Number of the adapter, or `BASE`.
        limits: Extent of the answer.
        expected_length: Expected length of the answer, for the order alone; in any unit.
    """

    ids: Sequence[int]
    limits: AnswerLimits
    model: int = BASE
    expected_length: int = 0


@dataclass
class Running:
    """An answer being written."""

    index: int
    query: Query
    slot: int
    pages: list[int]
    tokens: list[int] = field(default_factory=list)
    """Tokens written so far."""

    @property
    def cached_tokens(self) -> int:
        """Tokens in the cache: those of the prompt and all that were written, but for the last."""
        return len(self.query.ids) + len(self.tokens) - 1


@dataclass
class Paused:
    """An answer that was moved to host memory because pages ran out."""

    running: Running
    held: tuple[Tensor, Tensor]
    state: dict[str, Tensor]


class SlotTable:
    """All slots as static tensors on the device, which a captured step reads.

    Args:
        slots: Number of slots.
        most_tokens: Most tokens of a prompt and its answer.
        marks: Token ids that steer the writing.
        most_draws: Most tokens of a drawn answer, 0 for none.
        rotation: cos and sin for each position, fp32, (positions, head_dim / 2) each.
        shaped: As for `Writing`.
    """

    def __init__(
        self,
        slots: int,
        most_tokens: int,
        marks: Marks,
        most_draws: int,
        rotation: tuple[Tensor, Tensor],
        *,
        shaped: bool = False,
    ) -> None:
        device = rotation[0].device
        self.count = slots
        self.rotation = rotation
        self.writing = Writing(slots, marks, most_draws, device, shaped=shaped)
        self.token = torch.zeros(slots, dtype=torch.int64, device=device)
        self.position = torch.zeros(slots, dtype=torch.int32, device=device)
        self.model = torch.full((slots,), BASE, device=device)
        self.pages = torch.zeros(slots, pages_for(most_tokens), dtype=torch.int32, device=device)
        self._pages = torch.zeros(self.pages.shape, dtype=torch.int32)
        self.free = list(range(slots - 1, -1, -1))

    def now(self) -> Slots:
        """Return where each slot is; the rotations are computed on the device."""
        cos, sin = (table[self.position] for table in self.rotation)
        return Slots(self.position, self.pages, cos, sin)

    def begin(self, index: int, query: Query, pages: list[int]) -> Running:
        """Give a free slot and pages to a question; its prompt, but for the last token, is read."""
        running = Running(index, query, self.free.pop(), pages)
        self.token[running.slot] = query.ids[-1]
        self.position[running.slot] = len(query.ids) - 1
        self.model[running.slot] = query.model
        self.writing.begin(running.slot, query.limits)
        self.set_pages(running)
        return running

    def set_pages(self, running: Running) -> None:
        """Note the pages of an answer; `upload` makes them known to the device."""
        pages = running.pages
        self._pages[running.slot] = 0
        self._pages[running.slot, : len(pages)] = torch.tensor(pages, dtype=torch.int32)

    def upload(self) -> None:
        """Copy the pages to the device."""
        self.pages.copy_(self._pages)

    def clear(self, running: Running) -> None:
        """Free a slot."""
        self.writing.state["ended"][running.slot] = True
        self.position[running.slot] = 0
        self._pages[running.slot] = 0
        self.free.append(running.slot)

    def pause(self, running: Running, cache: PagedCache) -> Paused:
        """Move an answer to host memory, and free its slot and pages."""
        state = {name: tensor[running.slot].clone() for name, tensor in self._tensors().items()}
        paused = Paused(running, cache.to_host(running.pages), state)
        cache.give_back(running.pages)
        running.pages = []
        self.clear(running)
        return paused

    def resume(self, paused: Paused, pages: list[int], cache: PagedCache) -> Running:
        """Move an answer back, into a free slot and other pages."""
        running = paused.running
        running.slot, running.pages = self.free.pop(), pages
        cache.from_host(pages, paused.held)
        for name, tensor in self._tensors().items():
            tensor[running.slot] = paused.state[name]
        self.set_pages(running)
        return running

    def _tensors(self) -> dict[str, Tensor]:
        """Return the tensors with a number, or a row, for each slot."""
        own = {"token": self.token, "position": self.position, "model": self.model}
        return {**self.writing.state, **own}
