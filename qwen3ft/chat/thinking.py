"""Thinking told from answer while a model still writes."""

from __future__ import annotations

from typing import Literal

from qwen3ft.records.data import RejectedRowError

THINK_OPEN, THINK_CLOSE = "<think>", "</think>"

ChunkKind = Literal["thinking", "answer"]
Part = tuple[ChunkKind, str]


class ThinkingSplitter:
    """Takes text as it comes and gives it back as thinking or answer, without the tags.

    A tag may come in pieces: what could still become one is held back, and so is white space that
    may be the end. All parts together are what `quality.split_thinking` makes of the whole text;
    only that here the first closing tag ends the thinking, since nobody knows whether another one
    follows.

    Args:
        opened: Whether the prompt itself opened the think block.
    """

    def __init__(self, *, opened: bool) -> None:
        self._opened = opened
        self._text = ""
        self._given: dict[ChunkKind, str] = {"thinking": "", "answer": ""}

    def feed(self, text: str) -> list[Part]:
        """What is new, as far as it can be told yet."""
        self._text += text
        return self._news(final=False)

    def close(self) -> list[Part]:
        """What was held back, now that nothing more comes."""
        return self._news(final=True)

    def _news(self, *, final: bool) -> list[Part]:
        text = self._text.lstrip()
        opened = self._opened or text.startswith(THINK_OPEN)
        if not (opened or final) and THINK_OPEN.startswith(text):
            return []
        thinking, answer = "", text
        if opened:
            thinking, closed, answer = text.removeprefix(THINK_OPEN).partition(THINK_CLOSE)
            if not (closed or final):
                thinking = _without_partial(thinking, THINK_CLOSE)
        parts: list[Part] = []
        wholes: tuple[Part, Part] = ("thinking", thinking.strip()), ("answer", answer.strip())
        for kind, whole in wholes:
            if new := whole[len(self._given[kind]) :]:
                self._given[kind] = whole
                parts.append((kind, new))
        return parts


def _without_partial(text: str, tag: str) -> str:
    """`text` without an end that may be the beginning of `tag`."""
    for length in range(min(len(tag) - 1, len(text)), 0, -1):
        if text.endswith(tag[:length]):
            return text[:-length]
    return text


def split_thinking(text: str) -> tuple[str, str]:
    """(thinking, answer) of what a model wrote, each stripped.

    As in Qwen3's own parser, the last closing tag ends the thinking; an opening tag may be missing
    because the prompt held it. Thinking that was never closed has the answer ''.
    """
    before, closed, after = text.rpartition(THINK_CLOSE)
    if closed:
        return before.strip().removeprefix(THINK_OPEN).strip(), after.strip()
    if text.lstrip().startswith(THINK_OPEN):
        return text.lstrip().removeprefix(THINK_OPEN).strip(), ""
    return "", text.strip()


def split_think_block(text: str) -> tuple[str, str]:
    """(reasoning, rest) of what an assistant says: a leading think block and what follows it.

    The opening tag may be missing, as in what a model writes whose prompt held it.

    Raises:
        RejectedRowError: the block is never closed.
    """
    before, closed, after = text.partition(THINK_CLOSE)
    if closed:
        return before.strip().removeprefix(THINK_OPEN).strip(), after.strip()
    if text.lstrip().startswith(THINK_OPEN):
        raise RejectedRowError("unclosed_think")
    return "", text.strip()
