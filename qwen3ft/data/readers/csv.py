r"""Rows of csv and tsv by Python's csv module, each with its line and byte.

A record that fails costs the line it began on, and reading goes on at the next line. Lines end with
\n or \r\n; escape characters and comments are not covered.
"""

from __future__ import annotations

import csv
import io
import re
from collections import deque
from collections.abc import Iterator, Sequence
from typing import NamedTuple

from qwen3ft.data.readers.json_lines import skip_blank_lines, skip_line
from qwen3ft.data.readers.raw import (
    EXCERPT_BYTES,
    RawRow,
    UnreadableFileError,
    bad_row,
    refuse_repeated,
    usable_names,
)

DELIMITERS = (",", ";", "\t", "|")
_LEAST_REACH_BYTES = 1024
# Programs that know nothing of it put quotes around the line, and delimiters behind.
_STATED_DELIMITER = re.compile(r'"?sep=(\\t|[^\w"\r\n])"?[,;\t| ]*\r?\n?', re.IGNORECASE)


class _Line(NamedTuple):
    number: int
    offset: int
    content: bytes
    flaw: str


class _Lines(Iterator[str]):
    """The lines of a file for csv.reader; those of a record that failed are read again."""

    def __init__(self, stream: io.BufferedReader, offset: int, limit: int) -> None:
        self._stream, self._limit, self._place = stream, limit, (1, offset)
        self._again: deque[_Line] = deque()
        self._reach, self._size, self._is_cut = limit, 0, False
        self.record: list[_Line] = []
        self.is_utf8 = True

    def __next__(self) -> str:
        is_far = self._size >= self._reach
        line = None if is_far else self._again.popleft() if self._again else self._read()
        if line is None:
            self._is_cut = True
            # To csv.reader the file ends here, and with it the record; the next call goes on.
            raise StopIteration
        self.record.append(line)
        self._size += len(line.content)
        if line.flaw:
            raise StopIteration
        try:
            return line.content.decode()
        except UnicodeDecodeError:
            self.is_utf8 = False  # decoded all the same, to find where the record ends
            return line.content.decode("utf-8", "surrogateescape")

    def _read(self) -> _Line | None:
        content = self._stream.readline(self._limit)
        if content == b"\n" and not self.record:  # blank lines between records are no records
            blank = skip_blank_lines(self._stream)
            self._place = self._place[0] + blank, self._place[1] + blank
        (number, offset) = self._place
        size, flaw = len(content), "nul" if b"\0" in content else ""
        if size == self._limit and not content.endswith(b"\n"):
            size += skip_line(self._stream, self._limit)
            flaw, content = "row_too_large", content[:EXCERPT_BYTES]
        self._place = number + 1, offset + size
        return _Line(number, offset, content, flaw) if content else None

    def begin(self, kept: int) -> None:
        """Begin a record behind the first `kept` lines of the last one."""
        if kept == len(self.record) > 1:
            self._reach = min(self._limit, 2 * self._reach)
        elif self._is_cut:  # to follow each of many unclosed quotes that far would take too long
            self._reach = max(_LEAST_REACH_BYTES, self._reach // 2)
        self._again.extendleft(reversed(self.record[kept:]))
        self.record, self._size, self._is_cut, self.is_utf8 = [], 0, False, True


def read_csv(
    stream: io.BufferedReader, offset: int, limit: int, delimiters: Sequence[str] = DELIMITERS
) -> Iterator[RawRow]:
    """Yield a row for each record that is not blank.

    The delimiter is that of a first line sep=; (Excel's), or else the one that cuts the line of
    names into most.

    Raises:
        UnreadableFileError: the line of names cannot be read.
    """
    # Python refuses fields of more than 131,072 characters. The limit is global: never lowered.
    csv.field_size_limit(max(limit, csv.field_size_limit()))
    lines = _Lines(stream, offset, limit)
    names, delimiter = _header(lines, delimiters)
    # Strict: otherwise an unclosed quote makes one field of the rest of the file.
    reader = csv.reader(lines, delimiter=delimiter, strict=True)
    while names:
        try:
            values = next(reader, None)
        except csv.Error:
            values = None
        if not (record := lines.record):
            return
        first, kept, reason = record[0], len(record), ""
        if values is None or (len(values) != len(names) and _hides_rows(record, names, delimiter)):
            kept, reason = 1, first.flaw or "broken_csv"
        elif len(values) != len(names):
            reason = "wrong_column_count" if values else ""
        elif not lines.is_utf8:
            reason = "invalid_utf8"
        if reason:
            content = b"".join(line.content for line in record[:kept])
            yield bad_row(first.number, first.offset, reason, content)
        elif values:
            row = dict(zip(names, values, strict=True))
            yield RawRow(first.number, row, "", "", first.offset)
        lines.begin(kept)


def _header(lines: _Lines, delimiters: Sequence[str]) -> tuple[list[str], str]:
    """Consume the line of names; return them and the delimiter."""
    if stated := _STATED_DELIMITER.fullmatch(next(lines, "")):
        delimiters = ["\t" if stated[1].lower() == "\\t" else stated[1]]
    lines.begin(1 if stated else 0)
    best, taken, problem = 0, delimiters[0], ""
    for delimiter in delimiters:
        try:
            names = next(filter(None, csv.reader(lines, delimiter=delimiter, strict=True)), [])
            flaw = "".join(line.flaw for line in lines.record) if lines.is_utf8 else "invalid_utf8"
        except csv.Error as error:
            names, flaw = [], str(error)
        problem = problem or flaw
        if not flaw and len(names) > best:
            best, taken = len(names), delimiter
        lines.begin(0)
    if problem and not best:
        raise UnreadableFileError(f"the line of column names cannot be read: {problem}")
    found = next(filter(None, csv.reader(lines, delimiter=taken, strict=True)), [])
    lines.begin(len(lines.record))
    names = usable_names(found)
    refuse_repeated(names)
    return names, taken


def _hides_rows(record: list[_Line], names: list[str], delimiter: str) -> bool:
    """Return whether the lines inside a record are rows: a quote has been closed by a later one."""
    inside = [line.content.decode("utf-8", "replace") for line in record[1:-1]]
    try:
        rows = list(csv.reader(inside, delimiter=delimiter, strict=True))
    except csv.Error:
        return False
    return bool(rows) and all(len(row) == len(names) for row in rows)
