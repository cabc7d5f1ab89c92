"""A usable row of data, a bad one, and what a usable row may not hold.

It imports neither torch nor transformers.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, TypedDict

from qwen3ft.chat.conversation import (
    THINK_CLOSE,
    THINK_OPEN,
    Message,
    RejectedRowError,
    texts_of,
    user,
)
from qwen3ft.data.sources import Role

CONTROL_TOKENS = ("<|im_start|>", "<|im_end|>", "<|endoftext|>")
"""Written in a text, they would be read as the borders of a turn."""
TOOL_RESPONSE = "<tool_response>"
"""At the start of a user's message, Qwen's templates take it for a tool's."""


class QaRow(TypedDict):
    """One usable row; texts are stripped, and '' where there is none."""

    question: str
    """The last user message."""
    answer: str
    """The last assistant message, without its reasoning."""
    reasoning: str
    messages: list[Message]
    """The whole conversation where it is more than one question and its answer, else []."""
    tools: list[dict[str, Any]]
    kind: str
    """Group of questions to report on."""
    group: str
    """Rows of one source key are held out together."""
    role: Role
    file: str
    line: int
    offset: int
    """Byte where the row starts in the uncompressed file, -1 where there is no such thing."""


@dataclass(frozen=True, slots=True)
class BadRow:
    """One row left out: line is 1-based (the row for parquet), 0 the whole file."""

    file: str
    line: int
    offset: int
    reason: str
    excerpt: str


def messages_of(row: QaRow) -> list[Message]:
    """The row as messages."""
    return row["messages"] or [user(row["question"]), turn(row["answer"], row["reasoning"])]


def turn(answer: str, reasoning: str) -> Message:
    """What the assistant says; `reasoning` may be empty."""
    message: Message = {"role": "assistant", "content": answer}
    if reasoning:
        message["reasoning"] = reasoning
    return message


def check_content(row: QaRow, *, allow_control_tokens: bool) -> None:
    """Make sure that the row keeps its turns apart, and can be written as UTF-8.

    Raises:
        RejectedRowError: it does not.
    """
    question, answer, reasoning = row["question"], row["answer"], row["reasoning"]
    texts = [question, answer, reasoning, row["kind"], row["group"]]
    if row["messages"]:
        texts += texts_of(row["messages"], row["tools"])
    everything = "\n".join(texts)
    if not everything.isascii():
        try:
            everything.encode()
        except UnicodeEncodeError:
            raise RejectedRowError("lone_surrogate") from None
    if "\0" in everything:
        raise RejectedRowError("nul")
    if "<" not in everything:
        return
    if not allow_control_tokens and any(token in everything for token in CONTROL_TOKENS):
        raise RejectedRowError("control_token")
    for message in messages_of(row):
        said = message["content"]
        if message["role"] == "user" and said.startswith(TOOL_RESPONSE):
            raise RejectedRowError("control_token")
        if message["role"] == "assistant" and any(
            tag in text
            for tag in (THINK_OPEN, THINK_CLOSE)
            for text in (said, message.get("reasoning", ""))
        ):
            raise RejectedRowError("broken_think")
