"""Think blocks: `<think>reasoning</think>` before an answer.

`split_thinking` and `ThinkingSplitter` read what a model generates, whole and as it streams, and
accept anything. `split_think_block` reads what a data set says, and rejects a broken block.
"""

from __future__ import annotations

import re
from typing import Literal

from qwen3ft.records.data import RejectedRowError

THINK_OPEN, THINK_CLOSE = "<think>", "</think>"

# Templates strip line breaks before a text, and a tokenizer would join them to their own.
_LEADING_BREAKS = re.compile(r"\A\s*[\r\n]")

ChunkKind = Literal["thinking", "answer"]
ThinkingChunk = tuple[ChunkKind, str]


def is_opened(prompt: str) -> bool:
    """Return True if a prompt ends with the opening tag, which the model then does not write."""
    return prompt.rstrip().endswith(THINK_OPEN)


class ThinkingSplitter:
    """Splitter of streamed text into thinking and answer, without the tags.

    Text that may turn out to be part of a tag, or trailing white space, is held back. All chunks
    together equal `split_thinking` of the whole text, except that the first closing tag ends the
    thinking: whether another one follows is not known yet.

    Args:
        opened: True if the prompt itself opened the think block.
    """

    def __init__(self, *, opened: bool) -> None:
        self._opened = opened
        self._text = ""
        self._given: dict[ChunkKind, str] = {"thinking": "", "answer": ""}

    def feed(self, text: str) -> list[ThinkingChunk]:
        """Add text; return the chunks that are certain by now."""
        self._text += text
        return self._news(final=False)

    def close(self) -> list[ThinkingChunk]:
        """Return the chunks that were held back; the text is complete."""
        return self._news(final=True)

    def _news(self, *, final: bool) -> list[ThinkingChunk]:
        text = self._text.lstrip()
        opened = self._opened or text.startswith(THINK_OPEN)
        # It may still become an opening tag.
        if not (opened or final) and THINK_OPEN.startswith(text):
            return []
        thinking, answer = "", text
        if opened:
            thinking, closed, answer = text.removeprefix(THINK_OPEN).partition(THINK_CLOSE)
            if not (closed or final):
                thinking = _without_partial(thinking, THINK_CLOSE)
        parts: list[ThinkingChunk] = []
        wholes: dict[ChunkKind, str] = {"thinking": thinking.strip(), "answer": answer.strip()}
        for kind, whole in wholes.items():
            if new := whole[len(self._given[kind]) :]:
                self._given[kind] = whole
                parts.append((kind, new))
        return parts


def _without_partial(text: str, tag: str) -> str:
    """Return `text` without an end that may be the beginning of `tag`."""
    for length in range(min(len(tag) - 1, len(text)), 0, -1):
        if text.endswith(tag[:length]):
            return text[:-length]
    return text


def split_thinking(text: str) -> tuple[str, str]:
    """Split generated text into (thinking, answer), each stripped.

    As in Qwen3's own parser, the last closing tag ends the thinking, and the opening tag may be
    missing because the prompt had it. Thinking that is never closed has the answer ''.
    """
    before, closed, after = text.rpartition(THINK_CLOSE)
    if closed:
        return before.strip().removeprefix(THINK_OPEN).strip(), after.strip()
    if text.lstrip().startswith(THINK_OPEN):
        return text.lstrip().removeprefix(THINK_OPEN).strip(), ""
    return "", text.strip()


def split_think_block(text: str) -> tuple[str, str]:
    """Split an assistant's message in a data set into (reasoning, answer), each cleaned.

    The first closing tag ends the reasoning, so that a tag in the answer stays visible to checks of
    content. The opening tag may be missing, as in generated text, if the closing one begins or ends
    a line; inside a line it is prose about the tag.

    Raises:
        RejectedRowError: the block is never closed.
    """
    before, closed, after = text.partition(THINK_CLOSE)
    opened = text.lstrip().startswith(THINK_OPEN)
    if closed and (opened or _is_line_end(before, after)):
        return before.strip().removeprefix(THINK_OPEN).strip(), text_behind(after)
    if opened:
        raise RejectedRowError("unclosed_think")
    return "", clean_text(text)


def clean_text(text: str) -> str:
    """Return `text` without blank lines before it and white space behind; indentation stays."""
    if text[:1].isspace():
        text = _LEADING_BREAKS.sub("", text)
    return text.rstrip()


def text_behind(rest: str) -> str:
    """Clean what follows a marker; spaces on the marker's own line are no indentation."""
    return clean_text(rest.lstrip(" \t"))


def _is_line_end(before: str, after: str) -> bool:
    return before.endswith("\n") or not after or after.startswith(("\n", "\r"))
