r"""Rows of csv and tsv by Python's csv module, each with its line and byte.

A record that fails costs the line it began on, and reading goes on at the next line. Lines end with
\n or \r\n; escape characters and comments are not covered.
"""

from __future__ import annotations

import csv
import io
import re
from collections.abc import Iterator, Sequence
from contextlib import suppress
from itertools import accumulate
from typing import NamedTuple

from qwen3ft.data.readers.raw import (
    RawRow,
    UnreadableFileError,
    bad_row,
    refuse_repeated,
    usable_names,
)

DELIMITERS = (",", ";", "\t", "|")
_LEAST_REACH_BYTES = 1024
_BLOCK_BYTES = 64 * 1024
"""Most bytes of lines that csv.reader is given at once."""
_FIRST_LOOK_BYTES, _NEXT_LOOK = 256, 8
"""Bytes in which a record is expected to end, and how many times as many are tried next."""
# Programs that know nothing of it put quotes around the line, and delimiters behind.
_STATED_DELIMITER = re.compile(r'"?sep=(\\t|[^\w"\r\n\0])"?[,;\t| ]*\r?\n?', re.IGNORECASE)
_BLANK_LINES, _RETURNS = re.compile(rb"[\r\n]*\n"), re.compile(rb"\r*")
_OPEN_AT_END = "unexpected end of data"  # csv's words for a quote that was not closed


class _Record(NamedTuple):
    """One record, or the first line of a broken one."""

    content: bytes
    lines: int
    values: list[str] | None
    """None if it is broken."""
    flaw: str = ""
    """Reason code."""
    problem: str = ""
    """Words of csv.reader about a broken one."""
    is_cut: bool = False
    """A quote in it was followed as far as allowed, and not closed."""


class _Lines:
    """The lines of a file ahead of a place in it; those of a record that failed are read again."""

    def __init__(self, stream: io.BufferedReader, offset: int, limit: int) -> None:
        self._stream, self._limit = stream, limit
        self._held, self._start, self._is_end = bytearray(), 0, False
        """Bytes that were read, the place in them, and whether they are the file's last ones."""
        self.number, self.offset = 1, offset
        self._reach, self._singly_until = limit, 0

    def _fill(self) -> bool:
        """Read some more; return False at the end of the file."""
        chunk = self._stream.read1()
        del self._held[: self._start]
        self._start = 0
        self._held += chunk
        self._is_end = not chunk
        return bool(chunk)

    def move(self, lines: int, size_bytes: int) -> None:
        """Go on behind so many lines."""
        self.number += lines
        self._start += size_bytes
        self.offset += size_bytes

    def skip_blank_lines(self) -> None:
        """Go to the next line that is not blank, or is too large without an end in sight."""
        returns = 0  # bytes ahead that need no second look
        while returns < self._limit:
            # Lines that end so soon are not too large.
            end = self._start + self._limit
            if blank := _BLANK_LINES.match(self._held, self._start + returns, end):
                lines = self._held.count(b"\n", *blank.span())
                self.move(lines, blank.end() - self._start)
                returns = 0
                continue
            ahead = _RETURNS.match(self._held, self._start + returns)
            returns = len(self._held) - self._start
            if (ahead and ahead.end() < len(self._held)) or not self._fill():
                return

    def first_line(self) -> bytes:
        """Return the line ahead, or as much of it as a row may have; b'' at the end."""
        self._region(1)
        end = self._held.find(b"\n", self._start, self._start + self._limit) + 1
        return bytes(self._held[self._start : end or self._start + self._limit])

    def _region(self, reach_bytes: int) -> tuple[bytes, str]:
        """Return the lines that begin within so many bytes, up to one with a flaw, and its flaw."""
        seen = 0
        while True:
            # Only the last of the lines can be too large.
            reach = self._start + reach_bytes - 1
            last = max(self._start, self._held.rfind(b"\n", self._start, reach) + 1)
            end = self._held.find(b"\n", max(reach, self._start + seen), last + self._limit) + 1
            if end:
                return self._without_nul(end, "")
            if len(self._held) - last >= self._limit:
                return self._without_nul(last, "row_too_large")
            seen = len(self._held) - self._start
            if self._is_end or not self._fill():
                return self._without_nul(len(self._held), "")

    def _without_nul(self, end: int, flaw: str) -> tuple[bytes, str]:
        nul = self._held.find(b"\0", self._start, end)
        if nul >= 0:
            end, flaw = max(self._start, self._held.rfind(b"\n", self._start, nul) + 1), "nul"
        return bytes(self._held[self._start : end]), flaw

    def record(self, delimiter: str) -> _Record | None:
        """Return the record ahead; None at the end."""
        look = _FIRST_LOOK_BYTES
        while True:
            region, flaw = self._region(min(look, self._reach))
            if not region:
                return _Record(self.first_line(), 1, None, flaw) if flaw else None
            text = region.decode("utf-8", "surrogateescape")
            lines = io.StringIO(text, newline="\n")
            reader = csv.reader(lines, delimiter=delimiter, strict=True)
            try:
                values = next(reader)
            except csv.Error as error:
                is_open = str(error) == _OPEN_AT_END and not flaw
                is_all = self._is_end and len(region) == len(self._held) - self._start
                if is_open and look < self._reach and not is_all:
                    look *= _NEXT_LOOK
                    continue
                first = region[: region.find(b"\n") + 1] or region
                return _Record(first, 1, None, "broken_csv", str(error), is_open)
            used = text[: lines.tell()]
            content = used.encode("utf-8", "surrogateescape")
            return _Record(content, reader.line_num, values, _flaw_of(content))

    def take(self, record: _Record) -> None:
        """Go on behind a record."""
        self.look_less_far(record)
        if record.values is not None and record.lines > 1:
            self._reach = min(self._limit, 2 * self._reach)
        self.move(record.lines, len(record.content))
        if record.flaw == "row_too_large":
            self._skip_rest()

    def look_less_far(self, record: _Record) -> None:
        """Look for the end of quotes half as far, after a record in which that was in vain."""
        if record.is_cut:  # to follow each of many unclosed quotes that far would take too long
            self._reach = max(min(_LEAST_REACH_BYTES, self._limit), self._reach // 2)

    def _skip_rest(self) -> None:
        """Go to the line behind the rest of this one, which is not kept."""
        while not (end := self._held.find(b"\n", self._start) + 1):
            self.move(0, len(self._held) - self._start)
            if not self._fill():
                return
        self.move(0, end - self._start)

    def rows(self, names: list[str], delimiter: str) -> Iterator[RawRow]:
        """Yield the rows of the lines ahead that csv.reader can be given at once.

        It stops before a record that needs a closer look. Much of a file may need that: where
        little came of it, as many bytes are left to be read record by record.
        """
        if self.offset < self._singly_until:
            return
        if self._held.find(b"\n", self._start) < 0:
            self._fill()
        end = self._held.rfind(b"\n", self._start, self._start + min(_BLOCK_BYTES, self._limit))
        block = bytes(self._held[self._start : end + 1])
        lines = block.split(b"\n")
        ends = [0, *accumulate(len(line) + 1 for line in lines)]
        text = io.StringIO(_plain_text(block), newline="\n")
        reader = csv.reader(text, delimiter=delimiter, strict=True)
        number, offset, width, first = self.number, self.offset, len(names), 0
        with suppress(csv.Error):
            for values in reader:
                last, start = reader.line_num, ends[first]
                is_line = last == first + 1
                if len(values) == width and (is_line or ends[last - 1] - start < self._reach):
                    row = dict(zip(names, values, strict=True))
                    yield RawRow(number + first, row, "", "", offset + start)
                    if not is_line:
                        self._reach = min(self._limit, 2 * self._reach)
                elif not is_line:
                    break
                elif values:
                    content = lines[first] + b"\n"
                    place = (number + first, offset + start)
                    yield bad_row(*place, "wrong_column_count", content)
                first = last
        self.move(first, ends[first])
        if 2 * ends[first] <= len(block):
            self._singly_until = self.offset + _BLOCK_BYTES


def _flaw_of(content: bytes) -> str:
    try:
        content.decode()
    except UnicodeDecodeError:
        return "invalid_utf8"
    return ""


def _plain_text(block: bytes) -> str:
    """Return the text of whole lines, up to the first that has a NUL or is not UTF-8."""
    if b"\0" in block:
        block = block[: block.rfind(b"\n", 0, block.find(b"\0")) + 1]
    try:
        return block.decode()
    except UnicodeDecodeError as error:
        return block[: block.rfind(b"\n", 0, error.start) + 1].decode()


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
    while names:
        lines.skip_blank_lines()
        yield from lines.rows(names, delimiter)
        lines.skip_blank_lines()
        record = lines.record(delimiter)
        if record is None:
            return
        if record.values and len(record.values) != len(names):
            record = _refused(record, len(names), delimiter)
        if record.flaw:
            yield bad_row(lines.number, lines.offset, record.flaw, record.content)
        elif record.values:
            row = dict(zip(names, record.values, strict=True))
            yield RawRow(lines.number, row, "", "", lines.offset)
        lines.take(record)


def _header(lines: _Lines, delimiters: Sequence[str]) -> tuple[list[str], str]:
    """Consume the line of names; return them and the delimiter."""
    first_line = lines.first_line()
    if stated := _STATED_DELIMITER.fullmatch(first_line.decode("utf-8", "surrogateescape")):
        delimiters = ["\t" if stated[1].lower() == "\\t" else stated[1]]
        lines.move(1, len(first_line))
    lines.skip_blank_lines()
    best: list[str] = []
    taken, problem = delimiters[0], ""
    for delimiter in delimiters:
        if (record := lines.record(delimiter)) is None:
            break
        lines.look_less_far(record)
        problem = problem or record.problem or record.flaw
        if not record.flaw and len(record.values or ()) > len(best):
            best, taken = record.values or [], delimiter
    if problem and not best:
        raise UnreadableFileError(f"the line of column names cannot be read: {problem}")
    if best and (record := lines.record(taken)):
        lines.take(record)
    names = usable_names(best)
    refuse_repeated(names)
    return names, taken


def _refused(record: _Record, columns: int, delimiter: str) -> _Record:
    """Return a record of too many or too few values as a bad one.

    If the lines inside it are rows, a quote has been closed by a later one: it is broken.
    """
    content = record.content
    first_end, last_start = content.find(b"\n") + 1, content.rfind(b"\n", 0, -1) + 1
    inside = io.StringIO(content[first_end:last_start].decode("utf-8", "replace"), newline="\n")
    has_rows = False
    with suppress(csv.Error):
        for row in csv.reader(inside, delimiter=delimiter, strict=True):
            has_rows = len(row) == columns
            if not has_rows:
                break
        if has_rows:
            return _Record(content[:first_end], 1, None, "broken_csv")
    return record._replace(flaw="wrong_column_count")
