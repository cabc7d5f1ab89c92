"""Checked rows from a file's values: question, answer, reasoning, and the conversation around.

Every row of a file comes out exactly once, as a `QaRow` or as a `BadRow` with its place, a reason
code and a short masked excerpt; no content of a file raises. The same texts give the same rows in
every format. A wrong or useless answer is a good row here.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar

from qwen3ft.chat.conversation import assistant, texts_of, user
from qwen3ft.chat.functions import RowNotes, is_filled
from qwen3ft.chat.templates import TOOL_RESPONSE
from qwen3ft.chat.thinking import THINK_CLOSE, THINK_OPEN
from qwen3ft.config import ColumnNames, TrainingConfig
from qwen3ft.data.columns import Columns, find_columns, may_be_used
from qwen3ft.data.layouts import read_row
from qwen3ft.data.readers.open import read_raw
from qwen3ft.data.readers.raw import MAX_ROW_BYTES, RawRow, UnreadableFileError
from qwen3ft.logs import mask_secrets
from qwen3ft.records.data import BadRow, Message, QaRow, RejectedRowError, SourceFile
from qwen3ft.text.plain import escaped_line

UNREADABLE_FILE = "unreadable_file"
CONTROL_TOKENS = (
    *("<|im_start|>", "<|im_end|>", "<|endoftext|>", "<|object_ref_start|>", "<|object_ref_end|>"),
    *("<|box_start|>", "<|box_end|>", "<|quad_start|>", "<|quad_end|>", "<|vision_start|>"),
    *("<|vision_end|>", "<|vision_pad|>", "<|image_pad|>", "<|video_pad|>"),
)
"""Qwen's special tokens, which its tokenizer does not read as text wherever they stand."""
_CONTROL = re.compile("|".join(map(re.escape, CONTROL_TOKENS)))

_EXCERPT_CHARACTERS = 200
_LOOKED_AT_CHARACTERS = 5 * _EXCERPT_CHARACTERS
_MOST_COLUMN_SETS = 1024
_MOST_COUNTED = 1000
OTHER_NAMES = "(further names)"
"""Stands for names past the first `_MOST_COUNTED` that are not used."""
_MOST_NAME_CHARACTERS = 80
_Key = TypeVar("_Key")


def asked_by(row: QaRow) -> list[str]:
    """Return the texts of the user's turns, in order."""
    if not row["messages"]:
        return [row["question"]]
    return [m["content"] for m in row["messages"] if m["role"] == "user"]


def messages_of(row: QaRow) -> list[Message]:
    """Return the row as messages."""
    return row["messages"] or [user(row["question"]), assistant(row["answer"], row["reasoning"])]


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
    if not allow_control_tokens and _CONTROL.search(everything):
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


@dataclass
class RowCounts:
    """Counts of rows by how they were read."""

    columns: Counter[Columns] = field(default_factory=Counter)
    """Good rows by the columns they were read from."""
    unused: Counter[str] = field(default_factory=Counter)
    """Good rows by what of them is not used: columns, keys of messages, flags."""
    changed: Counter[str] = field(default_factory=Counter)
    """Good rows by changes of form."""
    incomplete: Counter[tuple[str, tuple[str, ...]]] = field(default_factory=Counter)
    """Rows by the part that they lack, question or answer, and the columns that they have."""
    notes: dict[str, list[str]] = field(default_factory=dict)
    """Notes on a file's reading, where that is not plain: its encoding, its sheet."""


def read_file(
    file: SourceFile, rules: RowRules, counts: RowCounts, limit: int = MAX_ROW_BYTES
) -> Iterator[QaRow | BadRow]:
    """Yield every row of `file`, in order; a file that breaks off ends with a `BadRow` of line 0.

    Args:
        file: The file to read.
        rules: The settings that decide how a row is read.
        counts: Receives how the rows were read.
        limit: Size of the largest row, in bytes.
    """
    unread: list[str] = []

    def choose(names: tuple[str, ...]) -> list[str]:
        chosen = may_be_used(names, rules.columns)
        unread.extend(name for name in names if name not in chosen)
        return chosen

    def note(text: str) -> None:
        notes = counts.notes.setdefault(file.label, [])
        if text not in notes:
            notes.append(text)

    reader = _RowReader(file, rules, counts, unread)
    try:
        for raw in read_raw(file.path, choose, limit, note):
            yield reader.row(raw)
    except (UnreadableFileError, OSError) as error:
        yield BadRow(file.label, 0, -1, UNREADABLE_FILE, excerpt(str(error)))


def excerpt(text: str) -> str:
    """Return the beginning of `text` with secrets masked, as valid UTF-8."""
    head = text[:_LOOKED_AT_CHARACTERS].encode("utf-8", "replace").decode()
    return mask_secrets(head)[:_EXCERPT_CHARACTERS]


@dataclass
class _RowReader:
    """Reader of the rows of one file, with what is the same for many of them."""

    file: SourceFile
    rules: RowRules
    counts: RowCounts
    unread: Sequence[str]
    """Columns of the file that are not even read."""
    columns: dict[tuple[str, ...], tuple[Columns, Columns]] = field(default_factory=dict)
    """Columns, and as they are counted, by the names of those that hold something.

    The rows of a file have few such sets. They are counted without the names of those that are not
    used: a row's id may be one.
    """

    def row(self, raw: RawRow) -> QaRow | BadRow:
        """Return the checked row."""
        label, counts = self.file.label, self.counts
        if raw.reason:
            return BadRow(label, raw.line, raw.offset, raw.reason, excerpt(raw.text))
        # A column without a value is absent: files that unite several layouts have empty ones.
        names = tuple([name for name, value in raw.values.items() if value is not None])
        known, notes = self.columns.get(names), RowNotes()
        columns = known[0] if known else None
        try:
            if known is None or columns is None:
                columns = find_columns(names, self.rules.columns)
                known = columns, columns._replace(unused=())
                if len(self.columns) < _MOST_COLUMN_SETS:
                    self.columns[names] = known
            separator = self.rules.reasoning_separator
            row = read_row(raw, columns, self.file, separator, notes)
            check_content(row, allow_control_tokens=self.rules.escape_special_tokens)
        except (RejectedRowError, RecursionError) as error:
            reason = str(error) if isinstance(error, RejectedRowError) else "too_deep"
            if reason in ("missing_question", "missing_answer"):
                part = reason.removeprefix("missing_")
                _count(counts.incomplete, (part, names), (part, ()))
            parts = columns.parts().values() if columns else ()
            values = {name: raw.values[name] for name in parts} or raw.values
            return BadRow(label, raw.line, raw.offset, reason, excerpt(_as_text(values)))
        counts.columns[known[1]] += 1
        if columns.unused or notes.unused or self.unread:
            unused = {name for name in columns.unused if is_filled(raw.values[name])}
            for name in (*(unused | notes.unused), *self.unread):
                # names from outside, shown on every page
                shown = escaped_line(mask_secrets(name))[:_MOST_NAME_CHARACTERS].strip()
                _count(counts.unused, shown or "(a column without a name)", OTHER_NAMES)
        for change in notes.changed:
            counts.changed[change] += 1
        return row


def _count(counts: Counter[_Key], key: _Key, others: _Key) -> None:
    """Count a row by `key`, or by `others` if there are too many keys to hold."""
    counts[key if key in counts or len(counts) < _MOST_COUNTED else others] += 1


def _as_text(values: dict[str, Any]) -> str:
    """Return the beginning of `values` as JSON, no shorter than an excerpt looks at."""
    text = ""
    try:
        for piece in json.JSONEncoder(ensure_ascii=False, default=repr).iterencode(values):
            text += piece
            if len(text) >= _LOOKED_AT_CHARACTERS:  # there may be millions of pieces
                break
    except (RecursionError, ValueError):
        return "nested too deeply to be shown"
    return text
