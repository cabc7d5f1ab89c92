"""Parsing of messages in the usual formats into a checked conversation.

Formats: OpenAI's (role and content, text parts, tool calls and the older function call, tool
results), Anthropic's parts, ShareGPT's (from and value), LLaMA-Factory's parts, and Firefly's pairs
of human and assistant. The result alternates as a chat template expects, ends with the assistant,
and holds text and JSON alone; anything else raises `RejectedRowError` with a reason code. A key
that holds something and is not used is noted, and content is not judged.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from qwen3ft.chat.conversation import assistant, check_order, user
from qwen3ft.chat.functions import (
    RowNotes,
    calls_in,
    is_filled,
    note_unused,
    parse_calls,
    parse_json,
    tagged_calls,
    tagged_results,
)
from qwen3ft.chat.thinking import clean_text, split_think_block
from qwen3ft.records.data import Message, MessageRole, RejectedRowError

_CALL_ROLES = ("function_call", "function_calls", "tool_call", "tool_calls")
_ROLES: dict[str, MessageRole] = {
    **dict.fromkeys(("system", "developer", "系统"), "system"),
    **dict.fromkeys(("user", "human", "prompter", "用户", "人类"), "user"),
    **dict.fromkeys(
        ("assistant", "gpt", "chatgpt", "chatbot", "bot", "ai", "model", "助手", *_CALL_ROLES),
        "assistant",
    ),
    **dict.fromkeys(
        ("tool", "function", "observation", "ipython", "tool_response", "tool_result"), "tool"
    ),
    **dict.fromkeys(("function_response", "工具"), "tool"),
}
_PAIRS = (("human", "assistant"), ("input", "output"))
"""Keys of items that are a question and its answer, as Firefly and Capybara have them."""
_REASONING_KEYS = ("reasoning_content", "reasoning", "thinking", "thought")
_FLAG_KEYS = ("weight", "loss_weight", "train", "training", "trainable", "loss")
"""Names under which data sets say if an answer carries loss."""
MEDIA_KEYS = ("image", "images", "video", "videos", "audio", "audios")

JOINED_USER_TURNS = "turns of the user in a row joined"
JOINED_CALLS = "function calls joined to the turn before"


@dataclass
class _Content:
    """Content of a message, by kind."""

    text: str = ""
    reasoning: list[str] = field(default_factory=list)
    calls: list[dict[str, Any]] = field(default_factory=list)
    results: list[str] = field(default_factory=list)
    """Results of tools, which Anthropic puts into the user's message."""


def parse_messages(
    value: Any, column: str, tool_names: Sequence[str], notes: RowNotes
) -> list[Message]:
    """Parse a conversation: a list of messages, or its JSON text.

    Args:
        value: The content of the column.
        column: Its name, for the notes.
        tool_names: Names of the functions on offer.
        notes: Receives what is not used, and what was changed.

    Raises:
        RejectedRowError: it is not a list of messages, or its turns are out of order.
    """
    items = parse_json(value, "messages") if isinstance(value, str) else value
    if not isinstance(items, Sequence) or isinstance(items, (str, bytes)):
        raise RejectedRowError("messages_not_a_list")
    if not items:
        raise RejectedRowError("empty_messages")
    messages: list[Message] = []
    for item in items:
        for message in _parse_message(item, f"{column}[]", notes):
            _append(messages, message, notes)
    for message, following in zip(messages, [*messages[1:], None], strict=True):
        may_call = message["role"] == "assistant" and "tool_calls" not in message
        # Elsewhere the row would have a call without its result.
        if not may_call or (following is not None and following["role"] != "tool"):
            continue
        text, calls = "", calls_in(message["content"], tool_names, notes)
        if not calls:
            text, calls = tagged_calls(message["content"], notes)
        if calls:
            message["content"], message["tool_calls"] = text, calls
    check_order(messages)
    return messages


def is_open(value: Any) -> bool:
    """Return True for a list of messages of which the last is the user's, or a tool's result."""
    if not isinstance(value, list) or not value or not isinstance(value[-1], Mapping):
        return False
    name = value[-1].get("role") or value[-1].get("from")
    return isinstance(name, str) and _ROLES.get(name.strip().lower()) in ("user", "tool")


def as_messages(answer: Any) -> list[Any]:
    """Return an answer beside messages as messages: a text, one message, or a list of them."""
    if isinstance(answer, str):
        return [{"role": "assistant", "content": answer}]
    return answer if isinstance(answer, list) else [answer]


def parse_text(value: Any, column: str, notes: RowNotes) -> str:
    """Parse a text that may be a list of parts, as in Anthropic's system prompts.

    Raises:
        RejectedRowError: it is neither, or a part is not text.
    """
    content = _parse_content(value, column, notes)
    if content.calls or content.results or content.reasoning:
        raise RejectedRowError("message_not_text")
    return content.text


def parse_history(value: Any) -> list[Message]:
    """Parse Alpaca's history: a list of [question, answer] pairs before the row's own.

    Raises:
        RejectedRowError: it is something else.
    """
    pairs = parse_json(value, "history") if isinstance(value, str) and value.strip() else value
    if not is_filled(pairs):
        return []
    if not isinstance(pairs, list):
        raise RejectedRowError("history_not_pairs")
    messages: list[Message] = []
    for pair in pairs:
        if not isinstance(pair, Sequence) or isinstance(pair, str) or len(pair) != 2:
            raise RejectedRowError("history_not_pairs")
        question, answer = (clean_text(part) if isinstance(part, str) else "" for part in pair)
        block, answer = split_think_block(answer)
        if not question or not answer:
            raise RejectedRowError("history_not_pairs")
        messages += [user(question), assistant(answer, block)]
    return messages


def _append(messages: list[Message], message: Message, notes: RowNotes) -> None:
    """Add a message, or join it to the one before where a template has one turn for both."""
    before = messages[-1] if messages else None
    if before is None or before["role"] != message["role"]:
        messages.append(message)
    elif message["role"] == "user":
        before["content"] += f"\n\n{message['content']}"
        notes.changed.add(JOINED_USER_TURNS)
    elif message["role"] == "assistant" and message.get("tool_calls") and not message["content"]:
        before["tool_calls"] = [*before.get("tool_calls", ()), *message["tool_calls"]]
        if not message.get("trained", True):
            before["trained"] = False
        notes.changed.add(JOINED_CALLS)
    else:
        messages.append(message)


def _parse_message(item: Any, path: str, notes: RowNotes) -> list[Message]:
    """Return the messages that one item of a list stands for."""
    if not isinstance(item, Mapping):
        raise RejectedRowError("message_not_an_object")
    for asked, answered in _PAIRS:
        if item.get(asked) is not None and item.get(answered) is not None:
            return _parse_pair(item, asked, answered, path, notes)
    if any(is_filled(item.get(key)) for key in MEDIA_KEYS):
        raise RejectedRowError("has_media")
    if is_filled(item.get("train_detail")):
        raise RejectedRowError("loss_of_parts")  # Axolotl's flags of pieces of a text
    name_key = "role" if item.get("role") is not None else "from"
    name = item.get(name_key)
    name = name.strip().lower() if isinstance(name, str) else ""
    role = _ROLES.get(name)
    if role is None:
        raise RejectedRowError("unknown_role")
    text_key = "content" if item.get("content") is not None else "value"
    is_call = name in _CALL_ROLES
    content = _Content() if is_call else _parse_content(item.get(text_key), path, notes)
    used = [name_key, text_key, *_FLAG_KEYS]
    if role == "assistant":
        used += ["tool_calls", "function_call", *_REASONING_KEYS]
        if is_call:
            content.calls += parse_calls(item.get(text_key), path, notes)
        messages = [_parse_assistant(item, content, path, notes)]
    else:
        if content.calls or content.reasoning:
            raise RejectedRowError("message_not_text")
        messages = [{"role": "tool", "content": result} for result in content.results]
        if content.text or not content.results:
            # A prompt or a result may be empty, and is rendered as such.
            if role == "user" and not content.text:
                raise RejectedRowError("empty_message")
            texts = tagged_results(content.text, notes) if role == "tool" else [content.text]
            messages += [{"role": role, "content": text} for text in texts]
        if any(flag_of(item.get(key)) for key in _FLAG_KEYS):
            notes.unused.add(f"{path}.weight of the {role}")
    note_unused(item, used, path, notes)
    return messages


def _parse_pair(
    item: Mapping[str, Any], asked: str, answered: str, path: str, notes: RowNotes
) -> list[Message]:
    """Return a pair of question and answer, under these two keys, as two messages."""
    question = _parse_content(item[asked], path, notes).text
    if not question:
        raise RejectedRowError("empty_message")
    answer = _parse_assistant({}, _parse_content(item[answered], path, notes), path, notes)
    note_unused(item, (asked, answered), path, notes)
    return [user(question), answer]


def _parse_assistant(
    item: Mapping[str, Any], content: _Content, path: str, notes: RowNotes
) -> Message:
    if content.results:
        raise RejectedRowError("message_not_text")
    said = [item[key] for key in _REASONING_KEYS if is_filled(item.get(key))]
    if not all(isinstance(text, str) for text in said):
        raise RejectedRowError("reasoning_not_text")
    block, text = split_think_block(content.text)
    message = assistant(text, one_reasoning([*said, *content.reasoning, block]))
    for key in ("tool_calls", "function_call"):
        if is_filled(item.get(key)):
            content.calls += parse_calls(item[key], f"{path}.{key}", notes)
    if content.calls:
        message["tool_calls"] = content.calls
    elif not message["content"]:
        raise RejectedRowError("empty_answer")
    if any(flag_of(item.get(key)) is False for key in _FLAG_KEYS):
        message["trained"] = False
    return message


def one_reasoning(texts: Sequence[str]) -> str:
    """Return the one reasoning that all of `texts` hold, '' if they are empty.

    Raises:
        RejectedRowError: they differ, so that one of them would be lost.
    """
    different = dict.fromkeys(text for each in texts if (text := each.strip()))
    if len(different) > 1:
        raise RejectedRowError("two_reasonings")
    return next(iter(different), "")


def flag_of(value: Any) -> bool | None:
    """Return a loss flag, True or False, 1 or 0; None where there is none.

    Raises:
        RejectedRowError: it is something else, such as a weight between 0 and 1.
    """
    if value is None or value == "":
        return None
    if isinstance(value, (bool, int, float)) and value in (0, 1):
        return bool(value)
    raise RejectedRowError("loss_weight_not_0_or_1")


def _parse_content(value: Any, path: str, notes: RowNotes) -> _Content:
    """Return a message's content by kind; parts of text are joined."""
    if value is None:
        return _Content()
    if isinstance(value, str):
        return _Content(clean_text(value))
    if not isinstance(value, list):
        raise RejectedRowError("message_not_text")
    found = _Content()
    texts: list[str] = []
    for part in value:
        if isinstance(part, str):
            texts.append(part)
        elif isinstance(part, Mapping):
            texts += _parse_part(part, f"{path}.content[]", found, notes)
        else:
            raise RejectedRowError("message_not_text")
    found.text = clean_text("".join(texts))
    return found


def _parse_part(part: Mapping[str, Any], path: str, found: _Content, notes: RowNotes) -> list[str]:
    """Return the texts of a part of a message; what is not text goes to `found`."""
    kind = str(part.get("type") or "text")
    if any(word in kind for word in ("image", "audio", "video", "file", "document")):
        raise RejectedRowError("has_media")
    texts: list[str] = []
    if kind in ("text", "input_text", "output_text"):
        key, text = _text_of(part, "text", "value")
        texts.append(text)
    elif kind in ("thinking", "reasoning"):
        key, text = _text_of(part, "thinking", "reasoning", "value", "text")
        found.reasoning.append(text)
    elif kind in ("tool_use", "tool_call"):
        key = "value"
        found.calls += parse_calls(part.get(key, part), path, notes)
        if key not in part:
            return []
    elif kind == "tool_result":
        key = "content"
        inner = _parse_content(part.get("content"), path, notes)
        if inner.calls or inner.results or inner.reasoning:
            raise RejectedRowError("message_not_text")
        found.results.append(inner.text)
    else:
        raise RejectedRowError("message_not_text")
    note_unused(part, ("type", key), path, notes)
    return texts


def _text_of(part: Mapping[str, Any], *keys: str) -> tuple[str, str]:
    """Return the first of `keys` that holds something, and its text."""
    key = next((key for key in keys if part.get(key) is not None), keys[0])
    if not isinstance(part.get(key), str):
        raise RejectedRowError("message_not_text")
    return key, part[key]
