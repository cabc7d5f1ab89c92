r"""Rows of csv and tsv, one record at a time, each with its line and byte.

Guarantees: quoted newlines belong to a record, by the rules of RFC 4180 and Python's csv module; a
quote that is never closed costs one line, for what was read beyond it is read again as lines of
their own (only where a later quote ends it well, and the width fits, does it look like a record).
The cost stays linear in the size of the file: a record that reaches the limit halves how far the
next one may reach, and one that ends well doubles it again.
The delimiter is the tab for .tsv; for .csv it is the one of , ; tab | that cuts the line of names
into most parts. Lines end with \n or \r\n. Other dialects (escape characters, comments) are not
covered.
"""

from __future__ import annotations

import csv
import io
from collections import deque
from collections.abc import Iterator
from typing import NamedTuple

from qwen3ft.data.readers.json_lines import skip_line
from qwen3ft.data.readers.raw import EXCERPT_BYTES, RawRow, UnreadableFileError, bad_row

DELIMITERS = (",", ";", "\t", "|")
EXCERPT_LINES = 16
LEAST_REACH_BYTES = 1024
"""How far a quoted field may reach even after many that were never closed."""


class _Line(NamedTuple):
    number: int
    offset: int
    content: bytes
    is_whole: bool


class _Lines:
    """The lines of a file as text for csv.reader, which takes as many as its record has."""

    def __init__(self, stream: io.BufferedReader, offset: int, limit: int) -> None:
        self._stream, self._offset, self._number = stream, offset, 0
        self._ahead: deque[_Line] = deque()
        self.limit = self.reach = limit
        self.record: list[_Line] = []
        self._size = 0
        self.was_cut = False

    def __iter__(self) -> _Lines:
        return self

    def __next__(self) -> str:
        """The next line of the record; none where it would reach too far."""
        if self._size >= self.reach and self.record:
            self.was_cut = True
            raise StopIteration
        line = self._ahead.popleft() if self._ahead else self._read()
        self._size += len(line.content)
        self.record.append(line)
        if not line.is_whole or b"\0" in line.content:
            raise StopIteration  # never parsed: the record is refused, or ends before this line
        return line.content.decode("utf-8", "surrogateescape")

    def _read(self) -> _Line:
        content = self._stream.readline(self.limit)
        if not content:
            self.was_cut = True
            raise StopIteration
        self._number += 1
        start, self._offset = self._offset, self._offset + len(content)
        is_whole = len(content) < self.limit or content.endswith(b"\n")
        if not is_whole:
            self._offset += skip_line(self._stream, self.limit)
            content = content[:EXCERPT_BYTES]
        return _Line(self._number, start, content, is_whole)

    def start(self) -> None:
        """Begin a record."""
        self.record, self._size, self.was_cut = [], 0, False

    def keep_first(self) -> None:
        """Give back all lines of the record but its first."""
        self._ahead.extendleft(reversed(self.record[1:]))
        del self.record[1:]
        if self.was_cut:
            self.reach = max(LEAST_REACH_BYTES, self.reach // 2)

    def rewind(self) -> None:
        """Give back the whole record."""
        self._ahead.extendleft(reversed(self.record))
        self.start()

    def widen(self) -> None:
        """A record of several lines ended well."""
        self.reach = min(self.limit, 2 * self.reach)


def read_csv(
    stream: io.BufferedReader, offset: int, limit: int, delimiter: str | None
) -> Iterator[RawRow]:
    """One row a record; blank lines are none.

    Args:
        stream: Behind the byte order mark, if there is one.
        offset: Of its first byte.
        limit: Largest record, in bytes.
        delimiter: None to choose by the line of names.

    Raises:
        UnreadableFileError: the line of names is none.
    """
    csv.field_size_limit(max(limit, csv.field_size_limit()))
    lines = _Lines(stream, offset, limit)
    names, delimiter = _header(lines, delimiter)
    reader = csv.reader(lines, delimiter=delimiter, strict=True)
    width = len(names)
    while width:
        lines.start()
        try:
            values = next(reader)
        except StopIteration:
            if not lines.record:
                return
            values = None
        except csv.Error:
            values = None
        record = lines.record
        first = record[0]
        if values is not None and len(record) > 1:
            if len(values) != width and _hides_rows(record, width, delimiter):
                values = None
            else:
                lines.widen()
        if values is None:
            lines.keep_first()
            yield bad_row(first.number, first.offset, _reason(first), first.content)
        elif len(values) == width:
            row = dict(zip(names, values, strict=True))
            if _is_utf8(record):
                yield RawRow(first.number, row, offset=first.offset)
            else:
                yield bad_row(first.number, first.offset, "invalid_utf8", _content(record))
        elif values:
            yield bad_row(first.number, first.offset, "wrong_column_count", _content(record))


def _header(lines: _Lines, delimiter: str | None) -> tuple[list[str], str]:
    """The names of the columns, and the delimiter between them; behind it come the rows."""
    candidates = (delimiter,) if delimiter else DELIMITERS
    best, problem = candidates[0], ""
    most: list[str] = []
    for candidate in candidates:
        try:
            names = _names(lines, candidate)
        except (csv.Error, UnicodeError) as error:
            names, problem = [], problem or str(error)
        if len(names) > len(most):
            most, best = names, candidate
        lines.rewind()
    if not most and problem:
        raise UnreadableFileError(f"the line of column names: {problem}")
    if most:
        _names(lines, best)
    return most, best


def _names(lines: _Lines, delimiter: str) -> list[str]:
    """The first record that is not blank; [] where there is none."""
    lines.start()
    for names in csv.reader(lines, delimiter=delimiter, strict=True):
        if names:
            for line in lines.record:
                line.content.decode()
            return names
    if lines.record and _reason(lines.record[-1]) != "broken_csv":
        raise csv.Error("it holds NUL bytes or is too long")
    return []


def _hides_rows(record: list[_Line], width: int, delimiter: str) -> bool:
    """Whether each line inside a record of a wrong width would be a row of the right one.

    Then the record's first quote was never meant to reach so far: a quote of a later line ended it.
    """
    inside = [line.content.decode("utf-8", "replace") for line in record[1:-1]]
    try:
        widths = {len(values) for values in csv.reader(inside, delimiter=delimiter, strict=True)}
    except csv.Error:
        return False
    return widths == {width}


def _reason(line: _Line) -> str:
    """Why a record that starts with `line` was not parsed."""
    if not line.is_whole:
        return "row_too_large"
    return "nul" if b"\0" in line.content else "broken_csv"


def _is_utf8(record: list[_Line]) -> bool:
    try:
        for line in record:
            if not line.content.isascii():
                line.content.decode()
    except UnicodeDecodeError:
        return False
    return True


def _content(record: list[_Line]) -> bytes:
    return b"".join(line.content for line in record[:EXCERPT_LINES])
