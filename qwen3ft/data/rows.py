"""Checked rows from a file's values: question, answer, reasoning, and the conversation around.

Every row of a file comes out exactly once, as a `QaRow` or as a `BadRow` with its place, a reason
code and a short masked excerpt; no content of a file raises. The same texts give the same rows in
every format. A wrong or useless answer is a good row here.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from qwen3ft.chat.conversation import (
    assistant,
    check_order,
    parse_history,
    parse_messages,
    parse_tools,
    texts_of,
    user,
)
from qwen3ft.chat.templates import TOOL_RESPONSE
from qwen3ft.chat.thinking import THINK_CLOSE, THINK_OPEN, split_think_block
from qwen3ft.config import ColumnNames, TrainingConfig
from qwen3ft.data.columns import Columns, find_columns
from qwen3ft.data.readers.open import read_raw
from qwen3ft.data.readers.raw import MAX_ROW_BYTES, RawRow, UnreadableFileError
from qwen3ft.logs import mask_secrets
from qwen3ft.records.data import BadRow, Message, QaRow, RejectedRowError, SourceFile
from qwen3ft.text.plain import escaped_line

UNREADABLE_FILE = "unreadable_file"
CONTROL_TOKENS = ("<|im_start|>", "<|im_end|>", "<|endoftext|>")
"""Tokens that a tokenizer reads as the borders of a turn wherever they stand."""

_EXCERPT_CHARACTERS = 200


def messages_of(row: QaRow) -> list[Message]:
    """Return the row as messages."""
    return row["messages"] or [user(row["question"]), turn(row["answer"], row["reasoning"])]


def turn(answer: str, reasoning: str) -> Message:
    """Return the assistant's message; `reasoning` may be empty."""
    message: Message = {"role": "assistant", "content": answer}
    if reasoning:
        message["reasoning"] = reasoning
    return message


def check_content(row: QaRow, *, allow_control_tokens: bool) -> None:
    """Make sure that no text looks like the border of a turn, and that all are valid UTF-8.

    Raises:
        RejectedRowError: with the reason code.
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
        content = message["content"]
        # Qwen's templates take such a message of a user for one of a tool.
        if message["role"] == "user" and content.startswith(TOOL_RESPONSE):
            raise RejectedRowError("control_token")
        if message["role"] == "assistant" and any(
            tag in text
            for tag in (THINK_OPEN, THINK_CLOSE)
            for text in (content, message.get("reasoning", ""))
        ):
            raise RejectedRowError("broken_think")


@dataclass(frozen=True)
class RowRules:
    """Settings that decide how a row is read."""

    columns: ColumnNames = field(default_factory=ColumnNames)
    reasoning_separator: str | None = None
    escape_special_tokens: bool = False


def rules_of(config: TrainingConfig) -> RowRules:
    """Return the rules that `config` sets."""
    return RowRules(
        config.columns, config.reasoning_separator, config.special_tokens_in_text == "escape"
    )


def read_file(
    file: SourceFile, rules: RowRules, used: Counter[Columns], limit: int = MAX_ROW_BYTES
) -> Iterator[QaRow | BadRow]:
    """Yield every row of `file`, in order; a file that breaks off ends with a `BadRow` of line 0.

    Args:
        file: The file to read.
        rules: The settings that decide how a row is read.
        used: Receives the number of good rows by the columns they were read from.
        limit: Size of the largest row, in bytes.
    """

    def choose(names: tuple[str, ...]) -> list[str]:
        return list(find_columns(names, rules.columns).parts().values())

    try:
        for raw in read_raw(file.path, choose, limit):
            yield _checked(raw, file, rules, used)
    except (UnreadableFileError, OSError) as error:
        yield BadRow(file.label, 0, -1, UNREADABLE_FILE, excerpt(str(error)))


def excerpt(text: str) -> str:
    """Return the beginning of `text` with secrets masked, as valid UTF-8."""
    head = text[: 5 * _EXCERPT_CHARACTERS].encode("utf-8", "replace").decode()
    return mask_secrets(head)[:_EXCERPT_CHARACTERS]


def _checked(
    raw: RawRow, file: SourceFile, rules: RowRules, used: Counter[Columns]
) -> QaRow | BadRow:
    if raw.reason:
        return BadRow(file.label, raw.line, raw.offset, raw.reason, excerpt(raw.text))
    columns = find_columns(tuple(raw.values), rules.columns)
    try:
        row = _row(raw, columns, file, rules)
        check_content(row, allow_control_tokens=rules.escape_special_tokens)
    except (RejectedRowError, RecursionError) as error:
        reason = str(error) if isinstance(error, RejectedRowError) else "too_deep"
        names = columns.parts().values()
        values = {name: raw.values.get(name) for name in names} or raw.values
        return BadRow(file.label, raw.line, raw.offset, reason, excerpt(_as_text(values)))
    used[columns] += 1
    return row


def _row(raw: RawRow, columns: Columns, file: SourceFile, rules: RowRules) -> QaRow:
    """Return the row, whichever of the known layouts it has."""
    values = raw.values
    row = QaRow(
        question="",
        answer="",
        reasoning="",
        messages=[],
        tools=parse_tools(values.get(columns.tools)) if columns.tools else [],
        kind="",
        group="",
        role=file.role,
        file=file.label,
        line=raw.line,
        offset=raw.offset,
    )
    asked = values.get(columns.question) if columns.question else None
    if columns.messages is not None:
        _fill_from_messages(row, parse_messages(values.get(columns.messages)), rules)
    elif isinstance(asked, list):  # a prompt of messages, completed by messages or a text
        completed = values.get(columns.answer) if columns.answer else None
        if isinstance(completed, str):
            completed = [{"role": "assistant", "content": completed}]
        if not isinstance(completed, list):
            raise RejectedRowError("missing_answer")
        _fill_from_messages(row, parse_messages([*asked, *completed]), rules)
    else:
        _fill_from_columns(row, values, columns, rules)
    # The name of a score, shown on every page.
    row["kind"] = escaped_line(mask_secrets(_optional_text(values, columns.kind, "kind")))
    row["group"] = _label(values, columns.group)
    return row


def _fill_from_columns(
    row: QaRow, values: Mapping[str, Any], columns: Columns, rules: RowRules
) -> None:
    question = _text(values, columns.question, "question")
    if addition := _optional_text(values, columns.addition, "question"):
        question = f"{question}\n{addition}"
    if context := _optional_text(values, columns.context, "context"):
        question = f"{context}\n\n{question}"
    block, answer = split_reasoning(_answer(values, columns.answer), rules.reasoning_separator)
    reasoning = _optional_text(values, columns.reasoning, "reasoning") or block
    if not answer:
        raise RejectedRowError("empty_answer")
    row["question"], row["answer"], row["reasoning"] = question, answer, reasoning
    messages: list[Message] = []
    if system := _optional_text(values, columns.system, "system"):
        messages.append({"role": "system", "content": system})
    if columns.history:
        messages += parse_history(values.get(columns.history))
    if messages or row["tools"]:
        row["messages"] = [*messages, user(question), turn(answer, reasoning)]
        check_order(row["messages"])


def _fill_from_messages(row: QaRow, messages: list[Message], rules: RowRules) -> None:
    last = messages[-1]
    if rules.reasoning_separator and not last.get("reasoning"):
        last = assistant(*reversed(split_reasoning(last["content"], rules.reasoning_separator)))
        messages[-1] = last
    if not last["content"]:
        raise RejectedRowError("empty_answer")
    row["question"] = next(m["content"] for m in reversed(messages) if m["role"] == "user")
    row["answer"], row["reasoning"] = last["content"], last.get("reasoning", "")
    # A question and its answer alone are stored once, not again as messages.
    if len(messages) > 2 or row["tools"]:
        row["messages"] = messages


def split_reasoning(answer: str, separator: str | None) -> tuple[str, str]:
    """Split an answer into (reasoning, answer) at its think block, or else its last separator.

    Raises:
        RejectedRowError: the think block is never closed.
    """
    if THINK_CLOSE in answer or answer.lstrip().startswith(THINK_OPEN):
        return split_think_block(answer)
    before, cut, after = answer.rpartition(separator) if separator else ("", "", answer)
    return (before.strip(), after.strip()) if cut else ("", answer.strip())


def _answer(values: Mapping[str, Any], column: str | None) -> str:
    """Return the answer's text; of SQuAD's list of accepted answers the first."""
    value = values.get(column) if column is not None else None
    if isinstance(value, Mapping):
        value = value.get("text")
    if isinstance(value, list):
        if not value:
            raise RejectedRowError("empty_answer")
        value = value[0].get("text") if isinstance(value[0], Mapping) else value[0]
    return _required(value, "answer")


def _text(values: Mapping[str, Any], column: str | None, part: str) -> str:
    return _required(values.get(column) if column is not None else None, part)


def _required(value: Any, part: str) -> str:
    if value is None:
        raise RejectedRowError(f"missing_{part}")
    if not isinstance(value, str):
        raise RejectedRowError(f"{part}_not_text")
    text = value.strip()
    if not text:
        raise RejectedRowError(f"empty_{part}")
    return text


def _optional_text(values: Mapping[str, Any], column: str | None, part: str) -> str:
    value = values.get(column) if column is not None else None
    if value is None:
        return ""
    if not isinstance(value, str):
        raise RejectedRowError(f"{part}_not_text")
    return value.strip()


def _label(values: Mapping[str, Any], column: str | None) -> str:
    """Return a source key, a text or a number, as text."""
    value = values.get(column) if column is not None else None
    return "" if value is None or isinstance(value, (list, Mapping)) else str(value).strip()


def _as_text(values: Mapping[str, Any]) -> str:
    """Return `values` as JSON, each cut short first."""
    short = 2 * _EXCERPT_CHARACTERS
    try:
        return json.dumps(
            {
                name: value[:short] if isinstance(value, str) else value
                for name, value in values.items()
            },
            ensure_ascii=False,
            default=repr,
        )
    except (RecursionError, ValueError):
        return "nested too deeply to be shown"
