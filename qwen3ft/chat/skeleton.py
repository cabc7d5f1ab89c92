"""The skeleton of a conversation: template text with slots, split where no token lies across.

The *shape* of a conversation is what templates branch on: roles, presence of content, reasoning
and tool calls, number of tools. The template is rendered once per shape with sentinels (private-use
characters) in place of all texts, so turns are found in template text alone. Each text must occur
exactly once, and the assistant's texts, and no others, inside its turns.

A *unit* is tokenised separately. Units are split at added tokens, which every tokenizer cuts out
first, and after a line break in template text that precedes a non-space, where Qwen's
pre-tokenizer always splits. So the ids equal those of the whole text. Not covered: texts with
surrounding white space, and templates that branch on content; `qwen3ft.chat.renderer` detects both.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple

from qwen3ft.chat.conversation import TEXT_FIELDS, Conversation
from qwen3ft.chat.templates import EMPTY_BLOCK, END_TOKEN, OPEN_BLOCK, TURN_HEADER, template_error
from qwen3ft.errors import TokenizerError

TemplatePart = str | int
"""Template text, or the number of a slot."""
Owner = Literal["system", "user", "assistant", "tool", "reasoning", "call", "tools", "data"]

OUTSIDE = -1

_MARK = "\ue000"
_SENTINEL = re.compile("\ue000slot([0-9]+)\ue001")
# Qwen's pre-tokenizer always splits here.
_AFTER_LINE_BREAK = re.compile(r"(?<=\n)(?=\S)")
_BY_ASSISTANT = ("assistant", "reasoning", "call")


class Slot(NamedTuple):
    """A place for text: who wrote it, and the text in the copied conversation."""

    owner: Owner
    text: str


class Unit(NamedTuple):
    """Text that is tokenised separately; `turn` numbers the assistant's turns, -1 is outside."""

    parts: tuple[TemplatePart, ...]
    turn: int

    @property
    def is_template(self) -> bool:
        """True if it is the same in every conversation of the shape."""
        return not any(isinstance(part, int) for part in self.parts)


@dataclass(slots=True)
class Skeleton:
    """A shape as units; `tail` is the template text after the last turn, which is not used."""

    units: list[Unit]
    turns: int
    tail: str = ""
    rows_seen: int = 0
    ids: list[bytes | None] = field(default_factory=list)
    """Token ids of the units of template text, as int32; None for units with slots."""

    def unit_texts(self, texts: Sequence[str]) -> list[str]:
        """Return the text of each unit with the slots filled."""
        return [fill_slots(unit.parts, texts) for unit in self.units]


def fill_slots(parts: Sequence[TemplatePart], texts: Sequence[str]) -> str:
    """Join parts to one text, with `texts` in the slots."""
    return "".join(part if isinstance(part, str) else texts[part] for part in parts)


def sentinel_copy(
    conversation: Conversation, protected: re.Pattern[str] | None = None
) -> tuple[Conversation, list[Slot]]:
    """Return a copy with sentinels in place of the texts, and the slots that they mark.

    Args:
        conversation: The conversation to copy.
        protected: None makes a slot of each tool and of the arguments of each tool call. A pattern
            keeps them as data, with slots for its matches only.
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
        # Templates expect an object and render it as JSON; `_split_at_sentinels` unwraps it.
        return {mark(owner, json.dumps(value, ensure_ascii=False)): 0}

    tools = [data("tools", tool) for tool in conversation.tools]
    messages = []
    for message in conversation.messages:
        copy = dict(message)
        for name in TEXT_FIELDS:
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
    """Split the rendering of a `sentinel_copy` into units.

    Args:
        rendered: The template's rendering of the copy.
        slots: Slots of the copy.
        turns: Number of assistant messages.
        prefills: True if the opening think tag belongs to the generation prompt.
        split_tokens: Splits template text at added tokens, as `re.split` with a group.
        is_prompt: True if the text ends with a generation prompt instead of a whole turn.

    Raises:
        TokenizerError: the template does not mark turns as Qwen does, changes or omits a text, or
            has a text of the assistant outside its turns.
    """
    marked, is_open = _mark_turns(_split_at_sentinels(rendered, slots), prefills)
    found = len({turn for _, turn in marked} - {OUTSIDE})
    if is_prompt != is_open or found != turns:
        raise template_error(
            f"The chat template does not continue its own prompt: {turns} messages of the "
            f"assistant are rendered as {found} turns from {TURN_HEADER!r} to {END_TOKEN!r}.",
            "Training would teach a format that inference does not use.",
        )
    tail = ""
    while not is_prompt and isinstance(marked[-1][0], str) and marked[-1][1] == OUTSIDE:
        tail = str(marked.pop()[0]) + tail
    for part, turn in marked:
        # A user's text inside a turn would be trained, and the assistant's outside would not.
        owner = slots[part].owner if isinstance(part, int) else "data"
        if owner != "data" and (owner in _BY_ASSISTANT) != (turn != OUTSIDE):
            raise _misplaced(owner, "on the wrong side of a turn's border")
    return Skeleton(_group(marked, split_tokens), turns, tail)


def _split_at_sentinels(rendered: str, slots: Sequence[Slot]) -> list[TemplatePart]:
    for number, slot in enumerate(slots):
        if slot.owner in ("tools", "call"):
            bare = f"{_MARK}slot{number}\ue001"
            rendered = rendered.replace(json.dumps({bare: 0}, ensure_ascii=False), bare)
    pieces = _SENTINEL.split(rendered)
    parts: list[TemplatePart] = [int(x) if i % 2 else x for i, x in enumerate(pieces) if x]
    for number, slot in enumerate(slots):
        times = parts.count(number)
        # Reasoning may be omitted, and data in a tool may be repeated.
        if times != 1 and slot.owner != "data" and not (slot.owner == "reasoning" and not times):
            raise _misplaced(slot.owner, f"{times} times instead of once")
    if any(isinstance(part, str) and _MARK in part for part in parts):
        raise template_error(
            "The chat template changes the texts it is given.",
            "The model would not be trained on the texts of the data.",
        )
    return parts


def _mark_turns(
    parts: Sequence[TemplatePart], prefills: bool
) -> tuple[list[tuple[TemplatePart, int]], bool]:
    """Split parts at turn borders; return (part, turn) pairs, and True if the last turn is open."""
    marked: list[tuple[TemplatePart, int]] = []
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
    """Count the characters at the start of a turn that are given to the model."""
    # The generation prompt ends after an empty think block if the model shall not think.
    if turn.startswith(EMPTY_BLOCK):
        return len(EMPTY_BLOCK)
    return len(OPEN_BLOCK) if prefills and turn.startswith(OPEN_BLOCK) else 0


def _group(
    marked: Sequence[tuple[TemplatePart, int]], split_tokens: Callable[[str], list[str]]
) -> list[Unit]:
    """Group parts into units: a slot with the template text that may share tokens with it."""
    units: list[Unit] = []
    before: TemplatePart = "\n"  # the start of a text is the start of a line
    for part, turn in marked:
        atoms: list[TemplatePart] = [part]
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


def _is_border(
    before: TemplatePart, after: TemplatePart, split_tokens: Callable[[str], list[str]]
) -> bool:
    """Return True if no token can lie across the border of two neighbouring atoms."""
    for atom in (before, after):
        if isinstance(atom, str) and split_tokens(atom) == ["", atom, ""]:
            return True
    begins_line = isinstance(before, str) and before.endswith("\n")
    return begins_line and (isinstance(after, int) or not after[0].isspace())


def _merge_template_text(units: Sequence[Unit]) -> list[Unit]:
    """Merge neighbouring units without slots: fewer calls of the tokenizer, the same tokens."""
    merged: list[Unit] = []
    for unit in units:
        last = merged[-1] if merged else None
        if last and last.turn == unit.turn and last.is_template and unit.is_template:
            merged[-1] = Unit((fill_slots((*last.parts, *unit.parts), ()),), unit.turn)
        else:
            merged.append(unit)
    return merged


def _misplaced(owner: Owner, how: str) -> TokenizerError:
    return template_error(
        f"The chat template renders the text of a message ({owner}) {how}.",
        "The model would not be trained on the texts of the data.",
    )
