"""Conversations written for the comparison of layouts, in one normal form.

Every layout says the same: row n of two layouts of one kind is the same `Talk`. The texts are of
several kinds by their number: English, Chinese, code whose first line is indented, nested lists,
JSON, signs and emoji.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

JsonDict = dict[str, Any]

_THINGS = ("lamp", "kettle", "bridge", "orchard", "ferry", "violin", "glacier", "beehive")
_PLACES = ("Rome", "Oslo", "Lima", "Kyoto", "Accra", "西安", "Malmö", "Zürich")


@dataclass(frozen=True)
class Talk:
    """A conversation as a chat template takes it.

    Messages have a role and content; the assistant's may have `reasoning`, `calls` (name and
    arguments) and `trained`, which is False where an answer carries no loss.
    """

    messages: list[JsonDict]
    tools: list[JsonDict] = field(default_factory=list)

    def texts(self) -> list[str]:
        """Return the contents of all messages, in order."""
        return [message["content"] for message in self.messages]


Talks = Callable[[int], Talk]


def said(role: str, content: str, **more: Any) -> JsonDict:
    """Return a message; of `more`, what is empty is left out."""
    return {
        "role": role,
        "content": content,
        **{name: value for name, value in more.items() if value not in ("", [], None, True)},
    }


def asked(n: int) -> str:
    """Return a question."""
    thing, place = _THINGS[n % 8], _PLACES[n * 3 % 8]
    return (
        f"What is the {thing} of {place} number {n} for?",
        f"{place}的第{n}号{thing}是做什么用的?",
        f"Complete this for case {n}:\n\ndef {thing}_{n}(x):\n    # doubles x, then adds {n}",
        f'Name three parts of the {thing} no. {n} in {place}; say "none" if there are none.',
        f"🙂 {thing}-{n} <b>&amp;</b> naïve café, {place}?",
    )[n % 5]


def answered(n: int, turn: int = 0) -> str:
    """Return an answer; that of code begins with spaces."""
    thing, number = _THINGS[n % 8], n + 100 * turn
    return (
        f"The {thing} number {number} keeps people warm.\n\nIt was built in {1800 + number}.",
        f"第{number}号{thing}用来取暖。\n它建于{1800 + number}年。",
        f"    y = 2 * x\n    return y + {number}",
        f"  - a frame\n    - of wood, {number} mm\n  - a roof\n  - a door",
        f'{{"{thing}": [{number}, null, true]}} 🇨🇳 \\n is no line break',
    )[n % 5]


def thought(n: int) -> str:
    """Return a reasoning of more than one line."""
    return (
        f"They ask about {_THINGS[n % 8]} {n}.\n\nI know two facts, {n} and {n + 1}.",
        f"用户问的是{_THINGS[n % 8]},编号{n}。\n先想一想。",
        f"Case {n}:\n    double it\n    then add",
    )[n % 3]


def rule(n: int) -> str:
    """Return a prompt of the system."""
    return (
        f"You are the guide of {_PLACES[n % 8]}. Be brief.",
        f"你是第{n}号助手。\n请如实回答。",
    )[n % 2]


def followed(n: int) -> str:
    """Return a second question."""
    return (f"And {n + 1} of them?", f"那么{n + 1}个呢?", f"  * why {n}?\n    * and how?")[n % 3]


def plain(n: int) -> Talk:
    """A question and its answer."""
    return Talk([said("user", asked(n)), said("assistant", answered(n))])


def ruled(n: int) -> Talk:
    """The same with a prompt of the system in two rows of three."""
    return Talk([*_rules(n), *plain(n).messages])


def reasoned(n: int) -> Talk:
    """A question and its answer, with reasoning in four rows of five."""
    reasoning = thought(n) if n % 5 else ""
    return Talk([said("user", asked(n)), said("assistant", answered(n), reasoning=reasoning)])


def ruled_reasoned(n: int) -> Talk:
    """The same with a prompt of the system in two rows of three."""
    return Talk([*_rules(n), *reasoned(n).messages])


def chat(n: int) -> Talk:
    """One to three questions and their answers."""
    messages = []
    for turn in range(1 + n % 3):
        messages.append(said("user", followed(n + turn) if turn else asked(n)))
        messages.append(said("assistant", answered(n, turn)))
    return Talk(messages)


def ruled_chat(n: int) -> Talk:
    """The same with a prompt of the system in two rows of three."""
    return Talk([*_rules(n), *chat(n).messages])


def reasoned_chat(n: int) -> Talk:
    """The same, with reasoning in some answers."""
    talk = chat(n)
    for turn, message in enumerate(talk.messages[1::2]):
        if (n + turn) % 4:
            message["reasoning"] = thought(n + turn)
    return talk


def flagged(n: int) -> Talk:
    """Two or three questions, of which not all answers carry loss; the last one does."""
    talk = chat(3 * n + 1 + n % 2)
    for turn, message in enumerate(talk.messages[1:-1:2]):
        if (n + turn) % 3:
            message["trained"] = False
    return talk


def ruled_flagged(n: int) -> Talk:
    """The same with a prompt of the system in two rows of three."""
    return Talk([*_rules(n), *flagged(n).messages])


def functions(n: int) -> list[JsonDict]:
    """Return one or two functions as OpenAI's servers take them."""
    weather = {
        "name": "get_weather",
        "description": 'Weather of a "city" <now>, 天气',
        "parameters": {
            "type": "object",
            "properties": {"city": {"type": "string"}, "days": {"type": "integer"}},
            "required": ["city"],
        },
    }
    clock = {
        "name": "clock",
        "description": "The time.",
        "parameters": {"type": "object", "properties": {}},
    }
    return [{"type": "function", "function": f} for f in (weather, clock)[: 1 + n % 2]]


def call(n: int) -> JsonDict:
    """Return a call of one of `functions(n)`."""
    if n % 4 == 3:
        return {"name": "clock", "arguments": {}}
    city = {"city": _PLACES[n % 8]}
    return {"name": "get_weather", "arguments": {**city, "days": n} if n % 2 else city}


def called(n: int) -> Talk:
    """A call, its result and the answer; the result is empty in one row of seven."""
    result = f'{{"t": {n}, "sky": "clear 晴"}}' if n % 7 else ""
    return Talk(
        [
            *_rules(n),
            said("user", f"{asked(n)} And the weather there?"),
            said("assistant", "", calls=[call(n)]),
            said("tool", result),
            said("assistant", answered(n)),
        ],
        functions(n),
    )


def called_with_text(n: int) -> Talk:
    """The same with text beside the call in every other row."""
    talk = called(n)
    if n % 2:
        next(m for m in talk.messages if "calls" in m)["content"] = f"Let me look, {n}."
    return talk


def called_with_thought(n: int) -> Talk:
    """The same with reasoning before the call and before the answer."""
    talk = called_with_text(n)
    for message in talk.messages:
        if message["role"] == "assistant" and n % 3:
            message["reasoning"] = thought(n + ("calls" in message))
    return talk


def called_often(n: int) -> Talk:
    """One or two calls at once, with their results, then another question in every other row."""
    talk = called(n)
    at = next(i for i, message in enumerate(talk.messages) if "calls" in message)
    if n % 2:
        talk.messages[at]["calls"].append(call(n + 2))
        talk.messages.insert(at + 2, said("tool", f"second result {n}\n  indented"))
    if n % 4 > 1:
        talk.messages.extend([said("user", followed(n)), said("assistant", answered(n, 1))])
    return talk


def called_and_asked(n: int) -> Talk:
    """A call and its result, beside which the user asks for more in every other row."""
    talk = called(n)
    if n % 2:
        talk.messages.insert(-1, said("user", followed(n)))
    return talk


def ends_with_calls(n: int) -> Talk:
    """A question, and one or two calls that answer it."""
    calls = [call(n), call(n + 2)] if n % 2 else [call(n)]
    messages = [said("user", asked(n)), said("assistant", "", calls=calls)]
    return Talk(messages, functions(n))


def without_rules(talks: Talks) -> Talks:
    """Return the same conversations without prompts of the system."""

    def cut(n: int) -> Talk:
        talk = talks(n)
        return replace(talk, messages=[m for m in talk.messages if m["role"] != "system"])

    return cut


def _rules(n: int) -> list[JsonDict]:
    return [said("system", rule(n))] if n % 3 else []
