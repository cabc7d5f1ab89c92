"""From files to checked question-answer rows: which column is what, and what makes a row bad.

Guarantees: every row of a file comes out exactly once, as a `QaRow` or as a `BadRow` with its
place, a reason code and a short masked excerpt; nothing in a file raises. The same texts give the
same rows in every format.
It does not judge content: a wrong or useless answer is a good row here.
It imports neither torch nor transformers.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, TypedDict

from qwen3ft.formats import RawRow, UnreadableFileError, read_raw
from qwen3ft.logs import mask_secrets
from qwen3ft.sources import Role, SourceFile

EXCERPT_CHARACTERS = 200

QUESTION_FIELDS = (
    *("question", "instruction", "prompt", "query", "problem", "input"),
    *("问题", "提问", "指令", "输入"),
)
ANSWER_FIELDS = (
    *("answer", "output", "completion", "response", "solution", "target"),
    *("答案", "回答", "回复", "输出"),
)
CONTEXT_OF = {"instruction": "input", "指令": "输入"}
"""Alpaca's second question column: appended to the instruction where it is not empty."""
REASONING_FIELDS = ("reasoning", "reasoning_content", "thinking", "思考", "推理")
KIND_FIELDS = ("kind", "split")

THINK_OPEN, THINK_CLOSE = "<think>", "</think>"
CONTROL_TOKENS = ("<|im_start|>", "<|im_end|>", "<|endoftext|>")
"""Written in a text, they would be read as the borders of a turn."""
TOOL_RESPONSE = "<tool_response>"

UNREADABLE_FILE = "unreadable_file"


class QaRow(TypedDict):
    """One usable row; texts are stripped, `reasoning` and `kind` may be ''."""

    question: str
    answer: str
    reasoning: str
    kind: str
    role: Role
    file: str
    line: int


@dataclass(frozen=True, slots=True)
class BadRow:
    """One row left out: line is 1-based (the row for csv, parquet, arrays), 0 the whole file."""

    file: str
    line: int
    reason: str
    excerpt: str


@dataclass(frozen=True)
class Fields:
    """The config's part in reading a row; None means found by its usual names."""

    question: str | None = None
    answer: str | None = None
    reasoning_separator: str | None = None


@dataclass(frozen=True)
class Columns:
    """Which column of one set of names plays which part."""

    question: str | None
    context: str | None
    answer: str | None
    reasoning: str | None
    kind: str | None

    def used(self) -> list[str]:
        """The names that are columns of the data."""
        names = (self.question, self.context, self.answer, self.reasoning, self.kind)
        return [name for name in names if name is not None]


class _RejectedError(ValueError):
    """A row cannot be used; the message is the reason code."""


def read_file(file: SourceFile, fields: Fields, used: Counter[Columns]) -> Iterator[QaRow | BadRow]:
    """Every row of `file`, in order; a file that breaks off ends with a `BadRow` of line 0.

    Args:
        file: What to read.
        fields: The config's part in it.
        used: Counts the columns that good rows were read from.
    """
    try:
        for raw in read_raw(file.path, lambda names: find_columns(names, fields).used()):
            yield _checked(raw, file, fields, used)
    except (UnreadableFileError, OSError) as error:
        yield BadRow(file.label, 0, UNREADABLE_FILE, excerpt(str(error)))


def excerpt(text: str) -> str:
    """The beginning of `text` with secrets masked, fit for a log and for UTF-8."""
    head = text[: 5 * EXCERPT_CHARACTERS].encode("utf-8", "replace").decode()
    return mask_secrets(head)[:EXCERPT_CHARACTERS]


@lru_cache(maxsize=1024)
def find_columns(names: tuple[str, ...], fields: Fields) -> Columns:
    """Match column names, ignoring case and outer spaces, with the parts of a row."""
    known = {name.strip().lower(): name for name in reversed(names)}

    def first(wanted: tuple[str, ...]) -> str | None:
        return next((known[name] for name in wanted if name in known), None)

    question = fields.question or first(QUESTION_FIELDS)
    context = None
    if fields.question is None and question is not None:
        context = known.get(CONTEXT_OF.get(question.strip().lower(), ""))
    return Columns(
        question=question if question in names else None,
        context=context,
        answer=_present(fields.answer or first(ANSWER_FIELDS), names),
        reasoning=first(REASONING_FIELDS),
        kind=first(KIND_FIELDS),
    )


def split_reasoning(answer: str, separator: str | None) -> tuple[str, str]:
    """(reasoning, answer) of an answer column: a leading think block, else what the separator cuts.

    The opening tag may be missing, as in what a model writes whose prompt held it. Of several
    separators the last one counts.
    """
    before, closed, after = answer.partition(THINK_CLOSE)
    if closed:
        return before.strip().removeprefix(THINK_OPEN).strip(), after.strip()
    if answer.lstrip().startswith(THINK_OPEN):
        raise _RejectedError("unclosed_think")
    before, cut, after = answer.rpartition(separator) if separator else ("", "", answer)
    return (before.strip(), after.strip()) if cut else ("", answer.strip())


def _present(name: str | None, names: tuple[str, ...]) -> str | None:
    return name if name in names else None


def _checked(
    raw: RawRow, file: SourceFile, fields: Fields, used: Counter[Columns]
) -> QaRow | BadRow:
    if raw.reason:
        return BadRow(file.label, raw.line, raw.reason, excerpt(raw.text))
    columns = find_columns(tuple(raw.values), fields)
    try:
        question = _question(raw.values, columns)
        block, answer = split_reasoning(
            _text(raw.values, columns.answer, "answer"), fields.reasoning_separator
        )
        reasoning = _optional_text(raw.values, columns.reasoning, "reasoning") or block
        kind = _optional_text(raw.values, columns.kind, "kind")
        _check_content(question, answer, reasoning, kind)
    except _RejectedError as error:
        values = {name: raw.values.get(name) for name in columns.used()} or raw.values
        return BadRow(file.label, raw.line, str(error), excerpt(_shown(values)))
    used[columns] += 1
    return QaRow(
        question=question,
        answer=answer,
        reasoning=reasoning,
        kind=kind,
        role=file.role,
        file=file.label,
        line=raw.line,
    )


def _shown(values: dict[str, Any]) -> str:
    """`values` as JSON-like text, each cut short before it is rendered."""
    short = 2 * EXCERPT_CHARACTERS
    return json.dumps(
        {
            name: value[:short] if isinstance(value, str) else value
            for name, value in values.items()
        },
        ensure_ascii=False,
        default=repr,
    )


def _question(values: dict[str, Any], columns: Columns) -> str:
    question = _text(values, columns.question, "question")
    context = _optional_text(values, columns.context, "question")
    return f"{question}\n{context}" if context else question


def _text(values: dict[str, Any], column: str | None, part: str) -> str:
    if column is None or values.get(column) is None:
        raise _RejectedError(f"missing_{part}")
    text = _optional_text(values, column, part)
    if not text:
        raise _RejectedError(f"empty_{part}")
    return text


def _optional_text(values: dict[str, Any], column: str | None, part: str) -> str:
    value = values.get(column) if column is not None else None
    if value is None:
        return ""
    if not isinstance(value, str):
        raise _RejectedError(f"{part}_not_text")
    return value.strip()


def _check_content(question: str, answer: str, reasoning: str, kind: str) -> None:
    """Reject what would corrupt the turn structure, or could not be written as UTF-8."""
    if not answer:
        raise _RejectedError("empty_answer")
    everything = "\n".join((question, answer, reasoning, kind))
    if "\0" in everything:
        raise _RejectedError("nul")
    try:
        everything.encode()
    except UnicodeEncodeError:
        raise _RejectedError("lone_surrogate") from None
    if any(token in everything for token in CONTROL_TOKENS) or question.startswith(TOOL_RESPONSE):
        raise _RejectedError("control_token")
    if any(tag in text for tag in (THINK_OPEN, THINK_CLOSE) for text in (answer, reasoning)):
        raise _RejectedError("broken_think")
