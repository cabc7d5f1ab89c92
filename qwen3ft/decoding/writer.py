"""Answering many questions: which of them is written when.

Of those that are known at the start, the longest expected answers come first; others may be added
and taken back at any time. When slots are free and pages suffice, prompts are read and
take them. If pages run out, the answer that began last waits in host memory.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch

from qwen3ft.decoding.cache import pages_for, places_of
from qwen3ft.decoding.decoder import Decoder
from qwen3ft.decoding.reading import READ_TEXTS
from qwen3ft.decoding.slots import Paused, Query, Running

BURST_STEPS = 8
"""Steps between two looks at which answers have ended."""


@dataclass(frozen=True)
class Written:
    """One answer as token ids, the end token included.

    Attributes:
        tokens: Token ids.
        thinking_cut: The end of its thinking was written for the model.
    """

    tokens: list[int]
    thinking_cut: bool


class AnswerWriter:
    """One use of a decoder: all of `queries`, and those that are added.

    Args:
        decoder: An idle decoder.
        queries: Questions, numbered from 0.
        burst_steps: Steps between two looks; fewer for somebody who waits.
    """

    def __init__(
        self, decoder: Decoder, queries: Sequence[Query], burst_steps: int = BURST_STEPS
    ) -> None:
        self.decoder, self.queries = decoder, dict(enumerate(queries))
        self.cache, self.table = decoder.cache, decoder.table
        self.burst_steps = burst_steps
        order = sorted(
            range(len(queries)), key=lambda index: (-queries[index].expected_length, index)
        )
        self.waiting = deque(order)
        self.running: list[Running] = []
        self.paused: deque[Paused] = deque()
        self._burst = torch.zeros(
            decoder.sizes.slots, burst_steps, dtype=torch.int64, device=decoder.device
        )

    def run(self) -> Iterator[tuple[int, Written]]:
        """Yield the index of each question with its answer, as they end."""
        for _, ended in self.bursts():
            yield from ended

    def bursts(self) -> Iterator[tuple[list[tuple[int, list[int]]], list[tuple[int, Written]]]]:
        """Yield after each burst the new tokens of every answer, and the answers that ended."""
        while self.is_busy:
            yield self.burst()

    @property
    def is_busy(self) -> bool:
        """True while there is something to write."""
        return bool(self.waiting or self.running or self.paused)

    def burst(self) -> tuple[list[tuple[int, list[int]]], list[tuple[int, Written]]]:
        """Write a few tokens of every answer; return them, and the answers that ended."""
        self._admit()
        self._secure_pages()
        self.table.upload()
        draw = any(each.query.limits.seed is not None for each in self.running)
        for step in range(self.burst_steps):
            self.decoder.step(draw=draw)
            self._burst[:, step] = self.table.token
        return self._collect()

    def add(self, index: int, query: Query, *, ahead: bool = False) -> None:
        """Add a question, under a number that no other has.

        It comes after those that wait, or with `ahead` before all of them.
        """
        self.queries[index] = query
        if ahead:
            self.waiting.appendleft(index)
        else:
            self.waiting.append(index)

    def cancel(self, index: int) -> None:
        """Write no more of an answer, and free its slot and pages; nothing if it has ended."""
        if self.queries.pop(index, None) is None:
            return
        if index in self.waiting:
            self.waiting.remove(index)
        self.paused = deque(each for each in self.paused if each.running.index != index)
        for running in [each for each in self.running if each.index == index]:
            self.running.remove(running)
            self._free(running)

    def _admit(self) -> None:
        """Fill free slots: first with answers that were paused, then with new questions."""
        while self.paused and self.table.free:
            needed = self._pages_after_burst(self.paused[0].running.cached_tokens + 1)
            if needed > self.cache.free_pages:
                break
            paused = self.paused.popleft()
            self.running.append(self.table.resume(paused, self.cache.take(needed), self.cache))
        # Reading prompts costs the same for one and for a chunk full of them.
        enough = max(1, min(len(self.waiting), self.decoder.sizes.slots // 16))
        if self.paused or (self.running and len(self.table.free) < enough):
            return
        while batch := self._next_batch():
            self._read_prompts(batch)

    def _next_batch(self) -> list[Running]:
        """Return questions that are read together, with slots and pages; empty if none fits."""
        batch: list[Running] = []
        tokens = 0
        while self.waiting and self.table.free:
            query = self.queries[self.waiting[0]]
            full = len(batch) == READ_TEXTS
            if full or (batch and tokens + len(query.ids) > self.decoder.sizes.chunk_tokens):
                break
            needed = self._pages_after_burst(len(query.ids))
            # Answers in progress get room to grow before new ones begin.
            reserve = (len(self.running) + len(batch)) // 2
            if needed + reserve > self.cache.free_pages:
                break
            running = self.table.begin(self.waiting.popleft(), query, self.cache.take(needed))
            batch.append(running)
            tokens += len(query.ids)
        self.running += batch
        return batch

    def _read_prompts(self, batch: Sequence[Running]) -> None:
        """Write keys and values of the prompts, but for their last tokens, into the cache."""
        longer = [each for each in batch if len(each.query.ids) > 1]
        if not longer:
            return
        texts = [each.query.ids[:-1] for each in longer]
        places = [
            places_of(each.pages, len(text)) for each, text in zip(longer, texts, strict=True)
        ]
        self.decoder.hidden(texts, [each.query.model for each in longer], places)

    def _pages_after_burst(self, tokens: int) -> int:
        # an answer that reaches its limit ends within the burst
        return min(pages_for(tokens + self.burst_steps), self.table.pages.shape[1])

    def _secure_pages(self) -> None:
        """Give every running answer pages for the next burst, the oldest first.

        Where pages run out, the newest answers wait in host memory: at last the one that needs
        them. The oldest always gets its pages, since the cache holds the longest answer.
        """
        for running in list(self.running):
            if not running.pages:  # it waits by now, and all after it
                break
            missing = self._pages_after_burst(running.cached_tokens + 1) - len(running.pages)
            while missing > self.cache.free_pages and running.pages:
                self.paused.append(self.table.pause(self.running.pop(), self.cache))
            if missing > 0 and running.pages:
                running.pages += self.cache.take(missing)
                self.table.set_pages(running)

    def _free(self, running: Running) -> None:
        self.cache.give_back(running.pages)
        self.table.clear(running)

    def _collect(self) -> tuple[list[tuple[int, list[int]]], list[tuple[int, Written]]]:
        state = self.table.writing.state
        names = ("written", "ended", "forced")
        flags = torch.stack([state[name].long() for name in names], 1)
        rows = torch.cat([flags, self._burst], 1).tolist()  # waits for the device
        news: list[tuple[int, list[int]]] = []
        ended: list[tuple[int, Written]] = []
        going: list[Running] = []
        for running in self.running:
            written, is_ended, forced, *burst = rows[running.slot]
            new = burst[: written - len(running.tokens)]
            running.tokens += new
            news.append((running.index, new))
            if is_ended:
                ended.append((running.index, Written(running.tokens, forced > 0)))
                del self.queries[running.index]
                self._free(running)
            else:
                going.append(running)
        self.running = going
        return news, ended
