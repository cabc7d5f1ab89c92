"""The text of a conversation as template text with slots, cut where tokens never lie across.

A *shape* is all of a conversation that templates branch on: its roles, which contents, reasonings
and tool calls there are, how many tools are offered. A template is rendered once for each shape,
with sentinels (private-use characters) in place of all texts; what stands between them is template
text. Guarantees: turns are found in template text alone, never in what somebody wrote; each text
is in its place exactly once; what the assistant wrote is inside its turns, all else outside.

Units are the stretches that are tokenised on their own. They are cut beside added tokens (which
every tokenizer cuts out first) and after line breaks of the template that something other than
white space follows (where the pre-tokenizer of Qwen always cuts), so that the ids are those of
the whole text. It does not cover texts with white space around them, nor content that a template
branches on: `qwen3ft.chat.rendering` compares with the template's own rendering to notice those.
It imports neither torch nor transformers.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple

from qwen3ft.chat.templates import EMPTY_BLOCK, END_TOKEN, OPEN_BLOCK, TURN_HEADER, template_error
from qwen3ft.errors import TokenizerError

Part = str | int
"""Template text, or the number of a slot."""
Owner = Literal["system", "user", "assistant", "tool", "reasoning", "call", "tools", "data"]
Shape = tuple[int, tuple[tuple[str, bool, bool, int], ...]]

OUTSIDE = -1

_TEXTS = ("content", "reasoning")
_MARK = "\ue000"
_SENTINEL = re.compile("\ue000slot([0-9]+)\ue001")
_AFTER_LINE_BREAK = re.compile(r"(?<=\n)(?=\S)")
_BY_ASSISTANT = ("assistant", "reasoning", "call")


class Conversation(NamedTuple):
    """The messages up to the last of the assistant, and the tools offered."""

    messages: Sequence[Mapping[str, Any]]
    tools: Sequence[Mapping[str, Any]]

    @property
    def history(self) -> Conversation:
        """All before the last message."""
        return Conversation(self.messages[:-1], self.tools)

    @property
    def shape(self) -> Shape:
        """What templates branch on."""
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
        """The text of each slot, in the order of `sentinel_copy`."""
        texts = [json.dumps(tool, ensure_ascii=False) for tool in self.tools]
        for message in self.messages:
            texts += [text for name in _TEXTS if (text := message.get(name))]
            for call in message.get("tool_calls") or ():
                texts += [call["name"], json.dumps(call["arguments"], ensure_ascii=False)]
        return texts


class Slot(NamedTuple):
    """Who wrote what stands in a slot; it was `text` in the conversation that was copied."""

    owner: Owner
    text: str


class Unit(NamedTuple):
    """What is tokenised on its own; `turn` counts the assistant's turns, -1 is outside of them."""

    parts: tuple[Part, ...]
    turn: int

    @property
    def is_template(self) -> bool:
        """Whether it is the same in every conversation of the shape."""
        return not any(isinstance(part, int) for part in self.parts)


@dataclass(slots=True)
class Skeleton:
    """A shape as units; `tail` is the template text after the last turn, which nobody needs."""

    units: list[Unit]
    turns: int
    tail: str = ""
    rows_seen: int = 0
    ids: list[list[int] | None] = field(default_factory=list)
    """Token ids of the units of template text; None where a slot is."""

    def unit_texts(self, texts: Sequence[str]) -> list[str]:
        """The text of each unit with the slots filled."""
        return [fill(unit.parts, texts) for unit in self.units]


def fill(parts: Sequence[Part], texts: Sequence[str]) -> str:
    """The parts as one text, slots replaced by their texts."""
    return "".join(part if isinstance(part, str) else texts[part] for part in parts)


def sentinel_copy(
    conversation: Conversation, protected: re.Pattern[str] | None = None
) -> tuple[Conversation, list[Slot]]:
    """A copy with sentinels in place of the texts, and the slots they mark.

    Args:
        conversation: What to copy.
        protected: None to make a slot of each tool and of the arguments of each tool call. A
            pattern to keep them as data, with slots for the matches alone.
    """
    slots: list[Slot] = []

    def mark(owner: Owner, text: str) -> str:
        slots.append(Slot(owner, text))
        return f"{_MARK}slot{len(slots) - 1}\ue001"

    def protect(value: Any) -> Any:
        if isinstance(value, str):
            assert protected is not None
            return protected.sub(lambda match: mark("data", match[0]), value)
        if isinstance(value, Mapping):
            return {protect(key): protect(item) for key, item in value.items()}
        return [protect(item) for item in value] if isinstance(value, list) else value

    def data(owner: Owner, value: Any) -> Any:
        if protected is not None:
            return protect(value)
        return {mark(owner, json.dumps(value, ensure_ascii=False)): 0}

    tools = [data("tools", tool) for tool in conversation.tools]
    messages = []
    for message in conversation.messages:
        copy = dict(message)
        for name in _TEXTS:
            if copy.get(name):
                copy[name] = mark("reasoning" if name == "reasoning" else copy["role"], copy[name])
        copy["tool_calls"] = [
            {
                "name": mark("call", call["name"]) if protected is None else protect(call["name"]),
                "arguments": data("call", call["arguments"]),
            }
            for call in message.get("tool_calls") or ()
        ]
        messages.append(copy)
    return Conversation(messages, tools), slots


def build_skeleton(
    rendered: str,
    slots: Sequence[Slot],
    turns: int,
    prefills: bool,
    split_tokens: Callable[[str], list[str]],
    *,
    is_prompt: bool,
) -> Skeleton:
    """Cut the rendering of a `sentinel_copy` into units.

    Args:
        rendered: What the template makes of the copy.
        slots: Those of the copy.
        turns: Assistant messages in it.
        prefills: Whether the opening think tag belongs to the generation prompt.
        split_tokens: Cuts template text beside added tokens, as `re.split` with a group.
        is_prompt: Whether the text ends with a generation prompt instead of a whole turn.

    Raises:
        TokenizerError: the template does not mark turns as Qwen does, changes a text, leaves one
            out, or has something of the assistant outside its turns.
    """
    marked, is_open = _mark_turns(_split_at_sentinels(rendered, slots), prefills)
    found = len({turn for _, turn in marked} - {OUTSIDE})
    if is_prompt != is_open or found != turns:
        raise template_error(
            f"The chat template does not continue its own prompt: {turns} messages of the "
            f"assistant are rendered as {found} turns from {TURN_HEADER!r} to {END_TOKEN!r}.",
            "Training on it would teach another format than the one inference asks for.",
        )
    tail = ""
    while not is_prompt and isinstance(marked[-1][0], str) and marked[-1][1] == OUTSIDE:
        tail = str(marked.pop()[0]) + tail
    for part, turn in marked:
        owner = slots[part].owner if isinstance(part, int) else "data"
        if owner != "data" and (owner in _BY_ASSISTANT) != (turn != OUTSIDE):
            raise _misplaced(owner, "on the wrong side of the borders of a turn")
    return Skeleton(_group(marked, split_tokens), turns, tail)


def _split_at_sentinels(rendered: str, slots: Sequence[Slot]) -> list[Part]:
    for number, slot in enumerate(slots):
        if slot.owner in ("tools", "call"):
            bare = f"{_MARK}slot{number}\ue001"
            rendered = rendered.replace(json.dumps({bare: 0}, ensure_ascii=False), bare)
    pieces = _SENTINEL.split(rendered)
    parts: list[Part] = [int(x) if i % 2 else x for i, x in enumerate(pieces) if x]
    for number, slot in enumerate(slots):
        times = parts.count(number)
        if times != 1 and slot.owner != "data" and not (slot.owner == "reasoning" and not times):
            raise _misplaced(slot.owner, f"{times} times instead of once")
    if any(isinstance(part, str) and _MARK in part for part in parts):
        raise template_error(
            "The chat template changes the texts it is given.",
            "What is trained would not be what the data say.",
        )
    return parts


def _mark_turns(parts: Sequence[Part], prefills: bool) -> tuple[list[tuple[Part, int]], bool]:
    """Each part, cut at the borders of turns, with its turn; whether the last turn is open."""
    marked: list[tuple[Part, int]] = []
    turn, inside = OUTSIDE, False
    for part in parts:
        if isinstance(part, int):
            marked.append((part, turn if inside else OUTSIDE))
            continue
        start = 0
        while start < len(part):
            border = END_TOKEN if inside else TURN_HEADER
            at = part.find(border, start)
            end = at + len(border) if at >= 0 else len(part)
            if at >= 0 and not inside:
                end += _given_in_prompt(part[end:], prefills)
            marked.append((part[start:end], turn if inside else OUTSIDE))
            if at >= 0:
                turn, inside = turn + (not inside), not inside
            start = end
    return marked, inside


def _given_in_prompt(turn: str, prefills: bool) -> int:
    """Characters at the beginning of a turn that the model is given and never writes."""
    if turn.startswith(EMPTY_BLOCK):
        return len(EMPTY_BLOCK)
    return len(OPEN_BLOCK) if prefills and turn.startswith(OPEN_BLOCK) else 0


def _group(
    marked: Sequence[tuple[Part, int]], split_tokens: Callable[[str], list[str]]
) -> list[Unit]:
    """Parts as units: slots with the template text that may share tokens with them."""
    units: list[Unit] = []
    before: Part = "\n"  # a text begins where a line would
    for part, turn in marked:
        atoms: list[Part] = [part]
        if isinstance(part, str):
            atoms = [a for cut in split_tokens(part) for a in _AFTER_LINE_BREAK.split(cut) if a]
        for atom in atoms:
            last = units[-1] if units else None
            if last is None or last.turn != turn or _is_border(before, atom, split_tokens):
                units.append(Unit((atom,), turn))
            else:
                units[-1] = Unit((*last.parts, atom), turn)
            before = atom
    return _merge_template_text(units)


def _is_border(before: Part, after: Part, split_tokens: Callable[[str], list[str]]) -> bool:
    """Whether no token can lie across the border of two neighbouring atoms."""
    for atom in (before, after):
        if isinstance(atom, str) and split_tokens(atom) == ["", atom, ""]:
            return True
    begins_line = isinstance(before, str) and before.endswith("\n")
    return begins_line and (isinstance(after, int) or not after[0].isspace())


def _merge_template_text(units: Sequence[Unit]) -> list[Unit]:
    """Neighbouring units without slots as one: fewer pieces, the same tokens."""
    merged: list[Unit] = []
    for unit in units:
        last = merged[-1] if merged else None
        if last and last.turn == unit.turn and last.is_template and unit.is_template:
            merged[-1] = Unit((fill((*last.parts, *unit.parts), ()),), unit.turn)
        else:
            merged.append(unit)
    return merged


def _misplaced(owner: Owner, how: str) -> TokenizerError:
    return template_error(
        f"The chat template renders the text of a message ({owner}) {how}.",
        "What is trained would not be what the data say.",
    )
