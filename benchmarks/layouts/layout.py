"""A layout: how a publisher writes a conversation, and a plain parser of its own for it."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from benchmarks.layouts.talks import JsonDict, Talk, Talks, said

_THINK = re.compile(r"<think>\n?(.*?)\n?</think>", re.DOTALL)


@dataclass(frozen=True)
class Layout:
    """One layout; `name` begins with the publisher."""

    name: str
    talks: Talks
    """Conversations of the rows."""
    write: Callable[[Talk, int], JsonDict]
    """Write row n as the publisher does."""
    read: Callable[[JsonDict], Talk | str]
    """Read a row as the publisher documents it; a reason code where the row is to be refused."""
    suffix: str = ".jsonl"
    columns: dict[str, str] = field(default_factory=dict)
    """Setting `columns` that the layout needs."""
    separator: str | None = None
    """Setting `reasoning_separator` that it needs."""


def refused(name: str, reason: str, talks: Talks, write: Callable[[Talk, int], JsonDict]) -> Layout:
    """Return a layout whose rows are all refused for `reason`."""
    return Layout(name, talks, write, lambda row: reason)


def tidy(text: str) -> str:
    """Return `text` without blank lines before it and white space behind it."""
    lines = text.split("\n")
    while lines and not lines[0].strip():
        lines.pop(0)
    return "\n".join(lines).rstrip()


def assistant(text: str, reasoning: str = "", **more: object) -> JsonDict:
    """Return an answer, with the think block that `text` may begin with as its reasoning."""
    if block := _THINK.match(text.lstrip()):
        reasoning, text = block[1], text.lstrip()[block.end() :]
    return said("assistant", tidy(text), reasoning=reasoning.strip(), **more)


def block(message: JsonDict) -> str:
    """Return an answer as text with its reasoning in a think block."""
    reasoning = message.get("reasoning")
    return f"<think>\n{reasoning}\n</think>\n\n" * bool(reasoning) + str(message["content"])


def question_of(talk: Talk) -> str:
    """Return the last question."""
    return next(str(m["content"]) for m in reversed(talk.messages) if m["role"] == "user")


def answer_of(talk: Talk) -> str:
    """Return the last answer."""
    return str(talk.messages[-1]["content"])


def rule_of(talk: Talk) -> str:
    """Return the prompt of the system, '' if there is none."""
    first = talk.messages[0]
    return str(first["content"]) if first["role"] == "system" else ""


def history_of(talk: Talk) -> list[list[str]]:
    """Return the pairs of question and answer before the last one."""
    texts = [m["content"] for m in talk.messages if m["role"] != "system"][:-2]
    return [list(pair) for pair in zip(texts[::2], texts[1::2], strict=True)]


def filled(row: JsonDict) -> JsonDict:
    """Return the row without what is empty."""
    return {key: value for key, value in row.items() if value not in ("", [], None)}


def pair(question: str, answer: str, system: str | None = "", **more: object) -> Talk:
    """Return a question and its answer, after a prompt of the system if there is one."""
    rules = [said("system", tidy(system))] if system else []
    return Talk([*rules, said("user", tidy(question)), assistant(answer, **more)])  # type: ignore[arg-type]


def turns(
    items: Sequence[JsonDict],
    roles: dict[str, str],
    keys: tuple[str, str] = ("role", "content"),
    system: str | None = "",
) -> list[JsonDict]:
    """Return messages of texts by the publisher's names of roles and keys."""
    messages = [said("system", tidy(system))] if system else []
    for item in items:
        role, text = roles[item[keys[0]]], item[keys[1]]
        messages.append(assistant(text) if role == "assistant" else said(role, tidy(text)))
    return messages
