"""Objects of a JSON array, of a list inside an object, or one after the other: one row at a time.

Guarantees: memory is bounded by a few times the largest row allowed, whatever the file's size; what
is wrong with one element costs that element alone (see `json_window` for how its end is found, and
what that cannot tell); a comma too many or missing costs nothing. SQuAD's nesting gives one row per
question (see `squad`).
A file that ends inside an array is `UnreadableFileError`, after the elements before.
"""

from __future__ import annotations

import io
import json
import re
from collections.abc import Iterator
from typing import Any

from qwen3ft.data.readers.json_array import is_squad, squad_rows
from qwen3ft.data.readers.json_lines import JsonParser, RejectedValueError, checked_object
from qwen3ft.data.readers.json_window import ELEMENT_ENDS, Starts, Window, end_of_broken, size_bytes
from qwen3ft.data.readers.raw import RawRow, UnreadableFileError, bad_row

LIST_FIELDS = (
    *("data", "rows", "examples", "train", "records", "items", "samples", "instances"),
    *("entries", "results", "dataset", "questions", "数据"),
)
"""A list of objects under one of these names is taken as the rows of a file."""

_CUT_MARGIN = 16
"""An error this near to the end of what was read may be due to the end: the longest literal."""
_PIECE = 16 * 2**10
_LEAST_IN_VAIN = 64 * 2**20
_SPACE = re.compile(r"[ \t\r\n]*")
_LIST_OF_OBJECTS = re.compile(r'\[(?:\s*[\]{]|(?:[^\[\]{]|\[[^\[\]{]*\]){0,4096}\{\s*["}])')
"""Empty, or with an object near its start: the first elements may be bad ones."""

_OBJECT_GOES_ON = re.compile(r'\}\s*$|,\s*(?:"[^"\\]*"\s*:|$)')
"""What may stand behind a list inside an object."""


def _may_be_cut(error: json.JSONDecodeError, text: str) -> bool:
    """Whether `text` may have become broken only by its end."""
    return error.pos >= len(text) - _CUT_MARGIN or error.msg.startswith("Unterminated string")


class _NoListError(Exception):
    """An object holds no list of rows, or is broken before it."""


class ElementReader:
    """Reads the elements of one file.

    Args:
        stream: Behind the byte order mark, if there is one.
        offset: Of its first byte.
        limit: Largest row, in bytes.
    """

    def __init__(self, stream: io.BufferedReader, offset: int, limit: int) -> None:
        self._window = Window(stream, offset)
        self._limit = limit
        self._parser = JsonParser()
        self._starts = Starts()
        self._in_vain = 0
        """Characters that were decoded without giving a value."""
        self._list_field = ""
        """The list being read is the value of this field; '' if it is the file's only value."""

    def enter_array(self) -> bool:
        """Step into the array that the file consists of; False if it is none."""
        if self._window.skip(_SPACE) != "[":
            return False
        self._window.move(self._window.at + 1)
        return True

    def enter_list_field(self) -> bool:
        """Step into the list of rows inside the object that the file consists of; False if none."""
        if self._window.skip(_SPACE) != "{":
            return False
        self._window.move(self._window.at + 1)
        try:
            self._list_field = self._find_list()
        except _NoListError:
            return False
        return bool(self._list_field)

    def elements(self, *, is_closed: bool) -> Iterator[RawRow]:
        """Every element from here on.

        Args:
            is_closed: The elements are those of a list that was entered, and end with it.

        Raises:
            UnreadableFileError: the file breaks off, or what follows the list is broken.
        """
        window = self._window
        while character := window.skip():
            if is_closed and character == "]":
                stray = self._leave_list()
                if stray is None:
                    return
                yield stray
            else:
                yield from self._element(is_closed)
        if is_closed:
            raise UnreadableFileError(f"the file ends in line {window.line}, inside a list")

    def _element(self, is_closed: bool) -> Iterator[RawRow]:
        window = self._window
        line, offset = window.line, window.offset
        found = self._decode()
        if found is None or not ELEMENT_ENDS.match(window.text, found[1]):
            yield from self._broken(is_closed)
            return
        value, end, flaw = found
        text, is_utf8 = window.text[window.at : end], True
        if text.isascii():
            size = len(text)
        else:
            try:
                size = len(text.encode())
            except UnicodeEncodeError:
                size, is_utf8 = size_bytes(text), False
        reason = "row_too_large" if size > self._limit else "" if is_utf8 else "invalid_utf8"
        try:
            if reason or flaw:
                raise RejectedValueError(reason or flaw)
            row = checked_object(value, text)
        except RejectedValueError as error:
            yield bad_row(line, offset, str(error), text)
        else:
            self._starts.learn(row, window.text, window.at)
            if "paragraphs" in row and is_squad(row):
                yield from squad_rows(row, text, line, offset)
            else:
                yield RawRow(line, row, "", "", offset)
        window.line = line + text.count("\n")
        window.offset = offset + size
        window.at = end

    def _decode(self) -> tuple[Any, int, str] | None:
        """(value, end, flaw) at the window's position; None if it is broken or too large.

        Tried on a short piece first: an error costs a pass over all of the text that is decoded.
        """
        window = self._window
        while True:
            piece = window.text[window.at : window.at + _PIECE]
            try:
                value, end, flaw = self._parser.raw_decode(piece, 0)
                if end < len(piece) or isinstance(value, (dict, list)):
                    return value, window.at + end, flaw
            except json.JSONDecodeError as error:
                if not _may_be_cut(error, piece):
                    return None
            except (RecursionError, ValueError):
                return None
            if len(piece) == _PIECE or not window.grow():
                return self._decode_long()

    def _decode_long(self) -> tuple[Any, int, str] | None:
        """As `_decode`, for values longer than a piece, up to the limit.

        What a bracket that is never closed makes it read in vain is bounded over the whole file.
        """
        window = self._window
        while self._in_vain <= _LEAST_IN_VAIN + 2 * window.offset:
            try:
                value, end, flaw = self._parser.raw_decode(window.text, window.at)
                if end < len(window.text) or isinstance(value, (dict, list)) or window.has_ended:
                    return value, end, flaw
                is_cut = True  # a number may go on
            except json.JSONDecodeError as error:
                is_cut = _may_be_cut(error, window.text)
            except (RecursionError, ValueError):
                is_cut = False
            if not is_cut or window.held > self._limit or not window.grow():
                self._in_vain += len(window.text)
                return None
        return None

    def _broken(self, is_closed: bool) -> Iterator[RawRow]:
        window, line, offset = self._window, self._window.line, self._window.offset
        text, length, has_end = end_of_broken(window, self._starts, self._is_other, self._limit)
        if not has_end:
            rest = window.text[window.at :]
            if is_closed and (border := self._border(rest)) < 0:
                raise UnreadableFileError(
                    f"what starts in line {line}, at byte {offset}, does not end: {text[:200]}"
                )
            window.move(window.at + border if is_closed else len(window.text))
            text = text[:border] if is_closed else text
        if length > self._limit:
            yield bad_row(line, offset, "row_too_large", text)
            return
        try:
            row = self._parser.parse_line(
                text.rstrip(" \t\r\n,").encode("utf-8", "surrogateescape")
            )
        except RejectedValueError as error:
            yield bad_row(line, offset, str(error), text)
        else:  # sound, but too long to be tried
            yield from (
                squad_rows(row, text, line, offset)
                if is_squad(row)
                else (RawRow(line, row, offset=offset),)
            )

    def _border(self, rest: str) -> int:
        """Where the list seems to end in the rest of a file whose last element is broken, or -1."""
        rest = rest.rstrip()
        if not rest.endswith("}" if self._list_field else "]"):
            return -1
        return rest.rfind("]")

    def _is_other(self, index: int) -> bool:
        """Whether a sound object that is no element stands at `index` of the window's text."""
        try:
            value, _, _ = self._parser.raw_decode(self._window.text[index : index + _PIECE], 0)
        except (ValueError, RecursionError):
            return False
        return self._starts.looks_other(value)

    def _leave_list(self) -> RawRow | None:
        """Step out of the list at its closing bracket; a bad row where that was not its end.

        Raises:
            UnreadableFileError: what follows in the object around it is broken.
        """
        window = self._window
        stray = bad_row(window.line, window.offset, "broken_json", "]")
        window.move(window.at + 1)
        follows = window.skip(_SPACE)
        if not self._list_field:
            if follows == "[":
                window.move(window.at + 1)
            return stray if follows else None
        if follows and not _OBJECT_GOES_ON.match(window.text, window.at):
            return stray
        try:
            second = self._find_list()
        except _NoListError:
            second, follows = "", ""
        if second:
            raise UnreadableFileError(
                f"it holds two lists of rows, {self._list_field!r} and {second!r}; "
                "give each a file of its own"
            )
        if not follows or window.skip(_SPACE):
            raise UnreadableFileError(
                f"what follows the list {self._list_field!r} is broken, in line {window.line}"
            )
        return None

    def _find_list(self) -> str:
        """Go through an object's fields up to a list of rows; its name, '' at the object's end.

        Raises:
            _NoListError: the object is broken, or a value in it larger than a row may be.
        """
        window = self._window
        while (sign := window.skip()) == '"':
            name = self._value()
            if window.skip(_SPACE) != ":":
                raise _NoListError
            window.move(window.at + 1)
            sign = window.skip(_SPACE)
            if sign == "[" and name.strip().lower() in LIST_FIELDS and self._is_list_of_objects():
                window.move(window.at + 1)
                return str(name)
            self._value()
        if sign != "}":
            raise _NoListError
        window.move(window.at + 1)
        return ""

    def _value(self) -> Any:
        """Consume one value."""
        found = self._decode()
        if found is None:
            raise _NoListError
        self._window.move(found[1])
        return found[0]

    def _is_list_of_objects(self) -> bool:
        """Whether the list at the window's position holds objects, or is empty."""
        window = self._window
        while window.text[window.at + 1 :].isspace() or window.held == 1:
            if window.held > self._limit or not window.grow():
                return False
        return _LIST_OF_OBJECTS.match(window.text, window.at) is not None
