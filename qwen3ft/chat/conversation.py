"""A conversation, and parsing of messages in the usual formats into a checked one.

Formats: OpenAI's (role and content, text parts, tool calls, tool results) and ShareGPT's (from and
value). The result alternates as a chat template expects, ends with the assistant, and holds text
and JSON alone; anything else raises `RejectedRowError` with a reason code. Nothing is dropped, and
content is not judged.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from qwen3ft.chat.thinking import split_think_block
from qwen3ft.records.data import Message, MessageRole, RejectedRowError

_ROLES: dict[str, MessageRole] = {
    **dict.fromkeys(("system", "developer", "系统"), "system"),
    **dict.fromkeys(("user", "human", "prompter", "用户", "人类"), "user"),
    **dict.fromkeys(
        ("assistant", "gpt", "chatgpt", "bot", "model", "助手", "function_call"), "assistant"
    ),
    **dict.fromkeys(("tool", "function", "observation", "ipython", "工具"), "tool"),
}
# Roles that may follow each role; None is the start.
_FOLLOWERS: dict[MessageRole | None, tuple[MessageRole, ...]] = {
    None: ("system", "user"),
    "system": ("user",),
    "user": ("assistant",),
    "assistant": ("user", "tool"),
    "tool": ("tool", "assistant"),
}

Shape = tuple[int, tuple[tuple[str, bool, bool, int], ...]]
"""Number of tools; of each message its role, presence of content and reasoning, tool calls."""

TEXT_FIELDS = ("content", "reasoning")


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
                bool(message.get("content")),
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


def parse_messages(value: Any) -> list[Message]:
    """Parse a conversation: a list of messages, or its JSON text.

    Raises:
        RejectedRowError: it is not a list of messages, or its turns are out of order.
    """
    items = _parse_json(value, "messages") if isinstance(value, str) else value
    if not isinstance(items, Sequence) or isinstance(items, (str, bytes)):
        raise RejectedRowError("messages_not_a_list")
    if not items:
        raise RejectedRowError("empty_messages")
    messages = [_parse_message(item) for item in items]
    check_order(messages)
    return messages


def parse_tools(value: Any) -> list[dict[str, Any]]:
    """Parse function schemas: a list of objects, or its JSON text; [] for None.

    Raises:
        RejectedRowError: it is something else.
    """
    if isinstance(value, str):
        value = _parse_json(value, "tools") if value.strip() else None
    if value is None:
        return []
    if not isinstance(value, list) or not all(isinstance(tool, dict) for tool in value):
        raise RejectedRowError("tools_not_a_list")
    return value


def parse_history(value: Any) -> list[Message]:
    """Parse Alpaca's history: a list of [question, answer] pairs before the row's own.

    Raises:
        RejectedRowError: it is something else.
    """
    pairs = _parse_json(value, "history") if isinstance(value, str) and value.strip() else value
    messages: list[Message] = []
    for pair in pairs or []:
        if not isinstance(pair, Sequence) or isinstance(pair, str) or len(pair) != 2:
            raise RejectedRowError("history_not_pairs")
        question, answer = (part.strip() if isinstance(part, str) else "" for part in pair)
        if not question or not answer:
            raise RejectedRowError("history_not_pairs")
        messages += [user(question), assistant(answer)]
    return messages


def user(content: str) -> Message:
    """Return a user's message."""
    return {"role": "user", "content": content}


def assistant(content: str, reasoning: str = "") -> Message:
    """Return an assistant's message; a think block in `content` becomes its reasoning."""
    block, content = split_think_block(content)
    reasoning = reasoning or block
    message: Message = {"role": "assistant", "content": content}
    if reasoning:
        message["reasoning"] = reasoning
    return message


def check_order(messages: Sequence[Message]) -> None:
    """Raise unless turns follow each other as in a chat and end with an answer.

    Raises:
        RejectedRowError: with the reason code.
    """
    before: MessageRole | None = None
    calls = False
    for message in messages:
        role = message["role"]
        if role not in _FOLLOWERS[before] or (before == "assistant" and calls != (role == "tool")):
            raise RejectedRowError("bad_turn_order")
        before, calls = role, bool(message.get("tool_calls"))
    if before != "assistant" or calls:
        raise RejectedRowError("ends_without_answer")


def texts_of(messages: Sequence[Message], tools: Sequence[dict[str, Any]]) -> list[str]:
    """Return every text of a conversation, with tool calls and tools as JSON."""
    texts = []
    for message in messages:
        texts += [message["content"], message.get("reasoning", "")]
        if calls := message.get("tool_calls"):
            texts.append(json.dumps(calls, ensure_ascii=False))
    if tools:
        texts.append(json.dumps(tools, ensure_ascii=False))
    return texts


def _parse_json(text: str, part: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        raise RejectedRowError(f"{part}_not_a_list") from None


def _parse_message(item: Any) -> Message:
    if not isinstance(item, Mapping):
        raise RejectedRowError("message_not_an_object")
    name = item.get("role", item.get("from"))
    role = _ROLES.get(name.strip().lower()) if isinstance(name, str) else None
    if role is None:
        raise RejectedRowError("unknown_role")
    content = _content(item.get("content", item.get("value")))
    if role != "assistant":
        if not content:
            raise RejectedRowError("empty_message")
        return {"role": role, "content": content}
    if name == "function_call":
        return {"role": role, "content": "", "tool_calls": _calls([_parse_json(content, "calls")])}
    reasoning = next(
        (item[key] for key in ("reasoning_content", "reasoning", "thinking") if item.get(key)), ""
    )
    if not isinstance(reasoning, str):
        raise RejectedRowError("reasoning_not_text")
    message = assistant(content, reasoning.strip())
    if calls := item.get("tool_calls"):
        message["tool_calls"] = _calls(calls)
    elif not message["content"]:
        raise RejectedRowError("empty_answer")
    return message


def _content(value: Any) -> str:
    """Return a message's text; OpenAI's list of text parts is joined."""
    if value is None:
        return ""
    if isinstance(value, list):
        parts = [part.get("text") if isinstance(part, Mapping) else part for part in value]
        if not all(isinstance(part, str) for part in parts):
            raise RejectedRowError("message_not_text")
        return "".join(str(part) for part in parts).strip()
    if not isinstance(value, str):
        raise RejectedRowError("message_not_text")
    return value.strip()


def _calls(value: Any) -> list[dict[str, Any]]:
    """Return tool calls as name and arguments; OpenAI wraps them, with arguments as JSON text."""
    calls = []
    for item in value if isinstance(value, list) else [None]:
        call = item.get("function", item) if isinstance(item, Mapping) else None
        arguments = call.get("arguments") if isinstance(call, Mapping) else None
        if isinstance(arguments, str):
            arguments = _parse_json(arguments, "calls")
        if call is None or not isinstance(call.get("name"), str) or not isinstance(arguments, dict):
            raise RejectedRowError("bad_tool_call")
        calls.append({"name": call["name"], "arguments": arguments})
    return calls
