"""A conversation: its messages, its shape, and the order that its turns must have."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

from qwen3ft.records.data import Message, MessageRole, RejectedRowError

# Roles that may follow each role; None is the start. A prompt of the system may come anywhere.
_FOLLOWERS: dict[MessageRole | None, tuple[MessageRole, ...]] = {
    None: ("user",),
    "user": ("assistant",),
    "assistant": ("user", "tool"),
    "tool": ("tool", "assistant", "user"),
}
Shape = tuple[int, tuple[tuple[str, int, bool, int], ...]]
"""Number of tools; of each message its role, content (0 none, 1 text, 2 indented text), presence of
reasoning, number of tool calls."""

TEXT_FIELDS = ("content", "reasoning")
_APART = "\n" * 4
"""Separator across which no text says of which kind the number behind it is (see `safety`)."""


class Conversation(NamedTuple):
    """Messages up to the last of the assistant, and the tools offered."""

    messages: Sequence[Mapping[str, Any]]
    tools: Sequence[Mapping[str, Any]]

    @property
    def history(self) -> Conversation:
        """The conversation before the last message."""
        return Conversation(self.messages[:-1], self.tools)

    @property
    def shape(self) -> Shape:
        """The features that templates branch on."""
        return len(self.tools), tuple(
            (
                message["role"],
                # A template may trim texts: only one with something to trim would show it.
                len(first := (message.get("content") or "")[:1]) + first.isspace(),
                bool(message.get("reasoning")),
                len(message.get("tool_calls") or ()),
            )
            for message in self.messages
        )

    def texts(self) -> list[str]:
        """Return the text of each slot, in the order of `sentinel_copy`."""
        texts = [json.dumps(tool, ensure_ascii=False) for tool in self.tools]
        for message in self.messages:
            texts += [text for name in TEXT_FIELDS if (text := message.get(name))]
            for call in message.get("tool_calls") or ():
                texts += [call["name"], json.dumps(call["arguments"], ensure_ascii=False)]
        return texts


def user(content: str) -> Message:
    """Return a user's message."""
    return {"role": "user", "content": content}


def assistant(content: str, reasoning: str = "") -> Message:
    """Return an assistant's message; `reasoning` may be empty."""
    message: Message = {"role": "assistant", "content": content}
    if reasoning:
        message["reasoning"] = reasoning
    return message


def answer_text(message: Message) -> str:
    """Return an assistant's message as the model writes it, calls as Qwen's templates have them."""
    calls = (
        f'<tool_call>\n{{"name": "{call["name"]}", "arguments": '
        f"{json.dumps(call['arguments'], ensure_ascii=False)}}}\n</tool_call>"
        for call in message.get("tool_calls") or ()
    )
    return "\n".join(filter(None, (message["content"], *calls)))


def check_order(messages: Sequence[Message]) -> None:
    """Raise unless turns follow each other as in a chat and end with an answer.

    Raises:
        RejectedRowError: with the reason code.
    """
    before: MessageRole | None = None
    calls = False
    for message in messages:
        role = message["role"]
        if role == "system" and not calls and before != "tool":
            continue
        if role not in _FOLLOWERS[before] or (before == "assistant" and calls != (role == "tool")):
            raise RejectedRowError("bad_turn_order")
        before, calls = role, bool(message.get("tool_calls"))
    if messages[-1]["role"] != "assistant":
        raise RejectedRowError("ends_without_answer")


def json_text(value: Any) -> str:
    """Return a JSON-compatible value as the templates have it."""
    return json.dumps(value, ensure_ascii=False)


def as_lines(value: Any) -> str:
    r"""Return the names, texts and numbers in a JSON-compatible value, one behind the other.

    Line breaks in them stay what they are; in JSON they are \n, of which a search sees the n.
    """
    lines, ahead = [], [value]
    while ahead:  # not by recursion: a value may be nested deeper than Python follows
        inner = ahead.pop()
        if isinstance(inner, dict):
            for name, content in reversed(inner.items()):
                ahead += [content, name]
        elif isinstance(inner, list):
            ahead += reversed(inner)
        else:
            # A number stays with its name, as in JSON: that of an order is no phone number.
            lines += [_APART, inner] if isinstance(inner, str) else ["\n", json_text(inner)]
    return "".join([*lines, _APART])


def texts_of(
    messages: Sequence[Message],
    tools: Sequence[dict[str, Any]],
    written: Callable[[Any], str] = json_text,
) -> list[str]:
    """Return every text of a conversation, with tool calls and tools as `written` gives them."""
    texts = []
    for message in messages:
        texts += [message["content"], message.get("reasoning", "")]
        if calls := message.get("tool_calls"):
            texts.append(written(calls))
        if not message.get("trained", True):
            texts.append("carries no loss")
    if tools:
        texts.append(written(tools))
    return texts
