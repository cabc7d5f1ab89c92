"""A row from a file's values, whichever of the known layouts it has.

A question and an answer in columns, alone or with context, system prompt, history and tools; or
messages, with such columns beside them. Marks in the data, of splits and of bad examples, are
followed.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from qwen3ft.chat.conversation import answer_text, assistant, check_order, user
from qwen3ft.chat.functions import RowNotes, calls_in, is_filled, note_unused, parse_tools
from qwen3ft.chat.messages import (
    as_messages,
    is_open,
    one_reasoning,
    parse_history,
    parse_messages,
    parse_text,
)
from qwen3ft.chat.thinking import (
    THINK_CLOSE,
    THINK_OPEN,
    clean_text,
    split_think_block,
    text_behind,
)
from qwen3ft.data.columns import Columns, is_chosen
from qwen3ft.data.readers.raw import RawRow
from qwen3ft.data.splits import DEV_NAMES
from qwen3ft.logs import mask_secrets
from qwen3ft.records.data import Message, QaRow, RejectedRowError, Role, SourceFile
from qwen3ft.text.plain import escaped_line

NOT_AN_EXAMPLE = "marked_as_no_example"
"""Reason code of rows that the data itself marks as bad: they are left out, and no fault."""
_SPLITS: dict[str, Role] = {
    **dict.fromkeys(("train", "training"), "train"),
    **dict.fromkeys(DEV_NAMES, "dev"),
    **dict.fromkeys(("test", "testing"), "test"),
}
_LABELS = {"true": True, "false": False}
"""Marks of good and bad examples; a number may be a class."""
_PLAIN_KEYS = {"role", "content", "reasoning"}


def read_row(
    raw: RawRow, columns: Columns, file: SourceFile, separator: str | None, notes: RowNotes
) -> QaRow:
    """Return the row, whichever of the known layouts it has.

    Args:
        raw: Values by column.
        columns: Column of each part.
        file: The file that it is from.
        separator: The setting `reasoning_separator`.
        notes: Receives what is not used, and what was changed.

    Raises:
        RejectedRowError: with the reason code.
    """
    values = raw.values
    if columns.media and any(is_filled(values[name]) for name in columns.media):
        raise RejectedRowError("has_media")
    # Of what follows, a row pays for the parts that it has: files have millions of plain rows.
    row: QaRow = {
        "question": "",
        "answer": "",
        "reasoning": "",
        "messages": [],
        "tools": parse_tools(values[columns.tools], notes) if columns.tools else [],
        "kind": "",
        "group": "",
        "role": file.role,
        "file": file.label,
        "line": raw.line,
        "offset": raw.offset,
    }
    if messages := _given_messages(values, columns, row["tools"], notes):
        _fill_from_messages(row, messages, values, columns, separator, notes)
    else:
        _fill_from_columns(row, values, columns, separator, notes)
    if columns.kind is not None:  # the name of a score, shown on every page
        row["kind"] = escaped_line(mask_secrets(_optional_text(values, columns.kind, "kind")))
    if columns.group is not None:
        row["group"] = _label(values[columns.group])
    _apply_marks(row, values, columns, notes)
    return row


def _given_messages(
    values: Mapping[str, Any],
    columns: Columns,
    tools: Sequence[Mapping[str, Any]],
    notes: RowNotes,
) -> list[Message]:
    """Return the messages of a row that is given as such; [] if it has columns of texts."""
    asked = values[columns.question] if columns.question else None
    answered = values[columns.answer] if columns.answer else None
    if columns.messages is None and not isinstance(asked, list) and not isinstance(answered, list):
        return []
    names = [tool["function"]["name"] for tool in tools]
    if columns.messages is not None:
        given, beside = values[columns.messages], [columns.question, columns.addition]
        if is_filled(answered) and is_chosen(columns.answer) and is_open(given):
            given = [*given, *as_messages(answered)]  # preference data with a prompt of messages
        else:
            beside.append(columns.answer)
        notes.unused.update(name for name in beside if name and is_filled(values[name]))
        return parse_messages(given, columns.messages, names, notes)
    if isinstance(asked, list):  # a prompt of messages, completed by messages or a text
        if answered is None:
            raise RejectedRowError("missing_answer")
        completed = [*asked, *as_messages(answered)]
        return parse_messages(completed, str(columns.question), names, notes)
    if isinstance(answered, list) and answered and _is_message(answered[0]):
        # Preference data: the chosen answer as messages, with the prompt or without.
        if len(answered) == 1:
            answered = [{"role": "user", "content": asked}, *answered]
        elif columns.question and not any(
            isinstance(item, Mapping) and item.get("content") == asked for item in answered
        ):
            notes.unused.add(columns.question)
        return parse_messages(answered, str(columns.answer), names, notes)
    return []


def _is_message(value: Any) -> bool:
    return isinstance(value, Mapping) and ("role" in value or "from" in value)


def _fill_from_columns(
    row: QaRow, values: Mapping[str, Any], columns: Columns, separator: str | None, notes: RowNotes
) -> None:
    question = _optional_text(values, columns.question, "question")
    if columns.addition is not None and (
        addition := _optional_text(values, columns.addition, "question")
    ):
        # Alpaca's instruction may be empty where the input says it all.
        question = f"{question}\n{addition}" if question else addition
    if not question:
        question = _required(values[columns.question] if columns.question else None, "question")
    if columns.context is not None and (
        context := _optional_text(values, columns.context, "context")
    ):
        question = f"{context}\n\n{question}"
    answered = values[columns.answer] if columns.answer else None
    reasoning = (
        _stated_reasoning(values, columns.reasoning, notes) if columns.reasoning is not None else ""
    )
    names = [tool["function"]["name"] for tool in row["tools"]]
    text = ""
    if not (calls := calls_in(answered, names, notes)):
        answered = _answer(answered, str(columns.answer), notes)
        block, text = split_reasoning(answered, separator)
        if not text:
            raise RejectedRowError("empty_answer")
        if block:
            reasoning = one_reasoning([reasoning, block])
    if not (columns.system or columns.history or row["tools"]):
        row["question"], row["answer"], row["reasoning"] = question, text, reasoning
        return
    answer = assistant(text, reasoning)
    if calls:
        answer["tool_calls"] = calls
    _fill(row, [*_messages_before(values, columns, notes), user(question), answer])


def _fill_from_messages(
    row: QaRow,
    messages: list[Message],
    values: Mapping[str, Any],
    columns: Columns,
    separator: str | None,
    notes: RowNotes,
) -> None:
    """Fill `row` from its messages, and from the columns beside them."""
    before = _messages_before(values, columns, notes)
    if messages[0]["role"] == "system":
        if before and before[0]["role"] == "system":
            if before[0] != messages[0]:
                raise RejectedRowError("two_systems")
            del before[0]
        before.insert(0, messages.pop(0))
    if context := _optional_text(values, columns.context, "context"):
        first = next(message for message in messages if message["role"] == "user")
        first["content"] = f"{context}\n\n{first['content']}"
    last = messages[-1]
    if separator and not last.get("reasoning"):
        block, last["content"] = split_reasoning(last["content"], separator)
        if block:
            last["reasoning"] = block
    stated = _stated_reasoning(values, columns.reasoning, notes)
    if reasoning := one_reasoning([stated, last.get("reasoning", "")]):
        last["reasoning"] = reasoning
    if not last["content"] and not last.get("tool_calls"):
        raise RejectedRowError("empty_answer")
    _fill(row, [*before, *messages])


def _messages_before(values: Mapping[str, Any], columns: Columns, notes: RowNotes) -> list[Message]:
    """Return the messages that columns of their own hold: the system's, and earlier turns."""
    messages: list[Message] = []
    if columns.system and (system := parse_text(values[columns.system], columns.system, notes)):
        messages.append({"role": "system", "content": system})
    if columns.history:
        messages += parse_history(values[columns.history])
    return messages


def _fill(row: QaRow, messages: list[Message]) -> None:
    """Set the row's texts by its messages, which end with the assistant's."""
    check_order(messages)
    last = messages[-1]
    row["question"] = next(m["content"] for m in reversed(messages) if m["role"] == "user")
    row["answer"], row["reasoning"] = answer_text(last), last.get("reasoning", "")
    # A question and its answer alone are stored once, not again as messages.
    is_plain = len(messages) == 2 and not row["tools"] and last.keys() <= _PLAIN_KEYS
    row["messages"] = [] if is_plain else messages


def _apply_marks(row: QaRow, values: Mapping[str, Any], columns: Columns, notes: RowNotes) -> None:
    """Follow the data's own marks: its splits, and which answers are no examples.

    Raises:
        RejectedRowError: nothing of the row is to be trained.
    """
    if columns.split:
        role = _SPLITS.get(str(values[columns.split]).strip().lower())
        if role is None or row["role"] != "train":
            notes.unused.add(columns.split)
        else:
            row["role"] = role
    if columns.label:
        mark = _LABELS.get(str(values[columns.label]).strip().lower())
        if mark is None:
            notes.unused.add(columns.label)
        elif not mark:
            raise RejectedRowError(NOT_AN_EXAMPLE)
    if not row["messages"] or row["messages"][-1].get("trained", True):
        return
    messages = list(row["messages"])
    # What follows the last answer that carries loss would only be read, never learned.
    while messages and (
        messages[-1]["role"] != "assistant" or not messages[-1].get("trained", True)
    ):
        messages.pop()
    if not messages:
        raise RejectedRowError(NOT_AN_EXAMPLE)
    notes.changed.add("turns after the last answer with loss left out")
    _fill(row, messages)


def split_reasoning(answer: str, separator: str | None) -> tuple[str, str]:
    """Split an answer into (reasoning, answer) at its think block, or else its last separator.

    Raises:
        RejectedRowError: the think block is never closed.
    """
    if THINK_OPEN in answer or THINK_CLOSE in answer:
        block, rest = split_think_block(answer)
        if block or THINK_CLOSE in answer:
            return block, rest
    before, cut, after = answer.rpartition(separator) if separator else ("", "", answer)
    return (before.strip(), text_behind(after)) if cut else ("", clean_text(answer))


def _answer(value: Any, column: str, notes: RowNotes) -> str:
    """Return the answer's text; of SQuAD's list of accepted answers the first."""
    if isinstance(value, list):
        if not value:
            raise RejectedRowError("empty_answer")
        if len(value) > 1:
            notes.unused.add(f"{column}[1:]")
        return _answer(value[0], column, notes)
    if isinstance(value, Mapping):
        note_unused(value, ("text",), column, notes)
        return _answer(value.get("text"), column, notes)
    return _required(value, "answer")


def _stated_reasoning(values: Mapping[str, Any], column: str | None, notes: RowNotes) -> str:
    """Return the reasoning in a column of its own: a text, or a list of one."""
    value = values.get(column) if column is not None else None
    if isinstance(value, list) and len(value) == 1:
        [value] = value
    if isinstance(value, bool) or value in ("on", "off"):
        notes.unused.add(str(column))  # it says whether there is reasoning
        return ""
    return _optional_text({"reasoning": value}, "reasoning", "reasoning")


def _required(value: Any, part: str) -> str:
    if value is None:
        raise RejectedRowError(f"missing_{part}")
    if not isinstance(value, str):
        raise RejectedRowError(f"{part}_not_text")
    text = clean_text(value)
    if not text:
        raise RejectedRowError(f"empty_{part}")
    return text


def _optional_text(values: Mapping[str, Any], column: str | None, part: str) -> str:
    value = values.get(column) if column is not None else None
    if value is None:
        return ""
    if not isinstance(value, str):
        raise RejectedRowError(f"{part}_not_text")
    return clean_text(value)


def _label(value: Any) -> str:
    """Return a source key, a text or a number, as text."""
    return "" if value is None or isinstance(value, (list, Mapping)) else str(value).strip()
