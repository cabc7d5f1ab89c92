"""Rows of a JSON array, of a list inside an object, or of objects one after the other.

Memory is bounded by a few times the largest row. A broken element costs itself: reading goes on at
the next line or bracket that begins an element like it. A SQuAD article gives a row per question.
"""

from __future__ import annotations

import codecs
import io
import json
import re
from collections.abc import Iterator
from contextlib import suppress
from itertools import islice
from typing import Any

from qwen3ft.data.readers.json_lines import JsonParser, RejectedValueError, is_json, reason_of
from qwen3ft.data.readers.raw import EXCERPT_BYTES, RawRow, UnreadableFileError, bad_row
from qwen3ft.data.readers.squad import is_article, questions_of
from qwen3ft.units import MIB

LIST_FIELDS = (
    *("data", "rows", "examples", "train", "records", "items", "samples", "instances"),
    *("entries", "results", "dataset", "questions", "数据"),
)
"""A list of objects under one of these names is taken as the rows of a file."""

_CHUNK_BYTES, _KEPT_BEHIND, _MOST_FIELDS = MIB, 256, 16
_SHORT, _LEAST_REACH, _MOST_VAIN = 4 * 2**10, 2**9, 32 * MIB
_NEAR = 16 * 2**10  # looked at behind a list
_CUT_MARGIN = 16  # longer than any literal that the end of the window may have cut
_BETWEEN = re.compile(r"[ \t\r\n,]*")
_AFTER_ELEMENT = re.compile(r"\s*(?:[,\]{]|$)")
_AFTER_LIST = re.compile(r'\s*(?:\}\s*$|,\s*"[^"\\]*"\s*:|$)')
_FIRST_FIELD = re.compile(r'\{\s*"([^"\\]{1,128})"\s*:')
_BEGINS = re.compile(rf"{_FIRST_FIELD.pattern}|\n([^\S\n]*+)(?=\{{)")
# A text may end at the end of what is there.
_TEXT_OR_BRACKET = re.compile(r'"(?:[^"\\]++|\\.?)*+"?|[\[\]{}]', re.DOTALL)
# The list is empty, or has an object near its start: the first elements may be bad ones.
_LIST = re.compile(
    rf'("\s*(?:{"|".join(LIST_FIELDS)})\s*")\s*:\s*\['
    r'(?=\s*[\]{]|(?:[^\[\]{]|\[[^\[\]{]*\]){0,4096}\{\s*["}])',
    re.IGNORECASE,
)


class ArrayReader:
    """Reads a file from `offset` on as a window of text, which grows as an element needs it."""

    def __init__(self, stream: io.BufferedReader, offset: int, limit: int, jq: str) -> None:
        self._stream, self._limit, self._jq, self._list_name = stream, limit, jq, "."
        self._text, self._at, self._line, self._offset = "", 0, 1, offset
        # Bytes that are not UTF-8 become lone surrogates, so that they cost one element.
        self._decoder = codecs.getincrementaldecoder("utf-8")("surrogateescape")
        self._parser, self._first_fields = JsonParser(), set[str]()
        self._vain, self._reach, self._element_size = 0, limit, 0
        self._is_list = self._is_object = False

    def enter(self) -> bool:
        """Step into the array, or the list inside an object, that the file is; False if neither."""
        self._is_object = self._skip() == "{"
        if self._is_object:
            self._is_list = self._enter_field("", self._limit)
        else:
            self._is_list = self._enter_array()
        return self._is_list

    def rows(self) -> Iterator[RawRow]:
        """Yield a row for each element from here on.

        Raises:
            UnreadableFileError: the file breaks off, or no more elements can be found in it.
        """
        is_open = self._is_list
        while sign := self._skip():
            if sign == "]" and self._is_list:
                is_open = self._leave_list()
                continue
            is_open, line, offset = self._is_list, self._line, self._offset
            try:
                row, end, reason = self._decode()
            except ValueError as error:
                yield self._skip_broken(reason_of(error))
                continue
            text = self._move(end)
            if reason or self._offset - offset > self._limit:
                yield bad_row(line, offset, reason or "row_too_large", text)
            elif is_article(row):
                yield from questions_of(row, line, offset)
            else:
                if len(self._first_fields) < _MOST_FIELDS:
                    self._first_fields.update(islice(row, 1))
                yield RawRow(line, row, "", "", offset)
        if is_open:
            raise UnreadableFileError(f"the file ends in line {self._line}, inside a list")

    def _grow(self, characters: int = 1) -> bool:
        """Read at least so many characters, unless the file ends; False if none is left."""
        size, piece, pieces = 0, b".", list[str]()
        while piece and size < characters:
            piece = self._stream.read1(_CHUNK_BYTES)
            pieces.append(self._decoder.decode(piece, final=not piece))
            size += len(pieces[-1])
        # A little of what was consumed stays, for it shows how far an element is indented.
        forgotten = max(0, self._at - _KEPT_BEHIND)
        self._text = "".join((self._text[forgotten:], *pieces))
        self._at -= forgotten
        return size > 0

    def _move(self, to: int) -> str:
        """Consume the text before index `to`, and return it."""
        passed, self._at = self._text[self._at : to], to
        self._line += passed.count("\n")
        is_ascii = passed.isascii()
        self._offset += len(passed if is_ascii else passed.encode("utf-8", "surrogateescape"))
        return passed

    def _skip(self) -> str:
        """Skip white space and commas; return the character behind, '' at the end of the file."""
        while match := _BETWEEN.match(self._text, self._at):
            self._move(match.end())
            if self._at < len(self._text) or not self._grow():
                break
        return self._text[self._at : self._at + 1]

    def _decode(self) -> tuple[dict[str, Any], int, str]:
        """Return (row, end, reason code or '') of the element that starts here.

        Raises:
            ValueError: it is broken, or larger than a row may be.
        """
        # An element whose bracket is never closed reaches to the end of the file. Once a multiple
        # of the file was read in vain, elements are followed less and less far.
        reach = self._reach if self._is_spent else self._limit
        size = min(max(_SHORT, 2 * self._element_size), reach)
        while True:
            # What fails costs time in proportion to all of the text, so that it gets no more.
            is_all = self._at + size >= len(self._text)
            start = self._at if is_all else 0
            text = self._text if is_all else self._text[self._at : self._at + size]
            row, end, problem = self._parse(text, start)
            # Only a bracket shows by itself that the element ends here.
            is_cut = not end or (end == len(text) and text[-1] not in "}]")
            size = len(text) - start
            if is_cut and size <= reach and (not is_all or self._grow(size)):
                size = len(self._text) if is_all else 2 * size
            elif not end:
                self._pay(size)
                raise RejectedValueError(problem)
            elif not _AFTER_ELEMENT.match(self._text, self._at + end - start):
                raise RejectedValueError("broken_json")
            else:
                self._element_size, self._reach = end - start, min(self._limit, 2 * self._reach)
                return row, self._at + end - start, problem

    def _parse(self, text: str, start: int) -> tuple[dict[str, Any], int, str]:
        """Return (row, end, reason code or '') of the element at `start`.

        The end is 0 if it goes on behind `text`.

        Raises:
            ValueError: it is broken.
        """
        try:
            return self._parser.parse_element(text, start)
        except RecursionError:
            self._vain += 16 * (len(text) - start)  # to count brackets takes so much longer
            return {}, _end_of_brackets(text, start), "too_deep"
        except json.JSONDecodeError as error:
            if error.pos + _CUT_MARGIN < len(text) and "Unterminated" not in error.msg:
                self._vain += error.pos - start
                raise
            return {}, 0, reason_of(error)

    def _pay(self, size: int) -> None:
        """Count `size` characters that were read in vain."""
        self._vain += size
        if self._is_spent:
            self._reach = max(_LEAST_REACH, min(self._reach, size) // 2)

    @property
    def _is_spent(self) -> bool:
        return self._vain > _MOST_VAIN + 2 * self._offset

    def _skip_broken(self, reason: str) -> RawRow:
        """Consume a broken element, up to where another one begins or the list ends.

        Sound JSON escapes the quotes and newlines of texts, so that none can look like a beginning.

        Raises:
            UnreadableFileError: neither is found.
        """
        line, offset = self._line, self._offset
        head = self._text[self._at : self._at + EXCERPT_BYTES]
        own = _FIRST_FIELD.match(self._text, self._at)
        names = self._first_fields | ({own[1]} if own else set())
        behind = self._text[max(0, self._at - _KEPT_BEHIND) : self._at]
        indent = behind[behind.rfind("\n") + 1 :]
        done = 1
        while (found := self._next_element(self._at + done, names, indent)) is None:
            done = max(1, len(self._text) - self._at - _KEPT_BEHIND)
            if done > self._limit:
                self._move(self._at + done)
                done = 0
            if not self._grow(done or 1):
                break
        end = len(self._text) if found is None else found
        if found is None and self._is_list:
            rest = self._text.rstrip()
            end = rest.rfind("]") if rest.endswith("}" if self._is_object else "]") else -1
            if end <= self._at:
                raise UnreadableFileError(
                    f"broken JSON in line {line}, at byte {offset}, and no element begins behind "
                    f"it; mend it, then: {self._jq.replace('{}', self._list_name)}"
                )
        text = self._move(end)
        reason = "nul" if reason == "broken_json" and "\0" in text else reason
        reason = "row_too_large" if self._offset - offset > self._limit else reason
        return bad_row(line, offset, reason, text if len(text) < len(head) else head)

    def _next_element(self, start: int, names: set[str], indent: str) -> int | None:
        """Return the index behind `start` where an element seems to begin; None if there is none.

        That is a bracket with one of `names` as its first field, behind a comma, bracket or line
        break; or any behind a line break and `indent`.
        """
        for found in _BEGINS.finditer(self._text, start):
            name, white = found.groups()
            if white is not None:
                if white == indent:
                    return found.end()
            elif (name in names or not names) and self._is_separated(found.start(), start):
                return found.start()
        return None

    def _is_separated(self, index: int, start: int) -> bool:
        while index > start:
            index -= 1
            character = self._text[index]
            if character in ",}]\n" or not character.isspace():
                return character in ",}]\n"
        return False

    def _leave_list(self) -> bool:
        """Go behind a list's closing bracket, into the next list; False where none is open."""
        self._move(self._at + 1)
        if not self._is_object:
            return self._skip() == "[" and self._enter_array()
        if len(self._text) - self._at < _NEAR:
            self._grow(_NEAR)
        before = '{"":0'  # makes the rest of the object one of its own
        if self._is_spent or not _AFTER_LIST.match(self._text, self._at) or self._is_nested(before):
            return True
        if self._enter_field(before, _CHUNK_BYTES):
            return True
        self._vain += len(self._text) - self._at
        is_whole = is_json(before + self._text[self._at :])
        self._move(len(self._text) if is_whole else self._at)
        return not is_whole

    def _is_nested(self, before: str) -> bool:
        """Return whether the file goes on behind the object: it was part of a broken element."""
        rest = before + self._text[self._at : self._at + _NEAR]
        self._vain += len(rest)
        with suppress(ValueError, RecursionError):
            return bool(rest[self._parser.parse_element(rest, 0)[1] :].strip())
        return False

    def _enter_array(self) -> bool:
        is_array = self._text.startswith("[", self._at)
        self._move(self._at + is_array)
        return is_array

    def _enter_field(self, before: str, reach: int) -> bool:
        """Step into the next list of rows of the object that `before` and the text here begin."""
        while True:
            fields = _LIST.finditer(self._text, self._at, self._at + reach)
            for field in islice(fields, _MOST_FIELDS):
                self._vain += field.start() - self._at
                # Sound fields before it: the list is the object's own, not one nested in it.
                if is_json(f'{before}{self._text[self._at : field.start()]}"":0}}'):
                    self._list_name = f".{field[1]}"
                    return bool(self._move(field.end()))
            held = len(self._text) - self._at
            self._vain += min(held, reach)
            if held > reach or not self._grow(held):
                return False


def _end_of_brackets(text: str, start: int) -> int:
    """Return the index behind the bracket that closes the one at `start`; 0 if none does."""
    depth = 0
    for found in _TEXT_OR_BRACKET.finditer(text, start):
        sign = text[found.start()]
        if sign != '"':
            depth += 1 if sign in "[{" else -1
            if depth == 0:
                return found.end()
    return 0
