"""JSON values that are fit to be rows, one a line.

A value that passes is finite, encodes as UTF-8, holds no NUL and is nested at most `MAX_DEPTH`
levels, whatever the depth of the caller's own stack. Reason codes: nul, invalid_utf8, too_deep,
nan_literal, number_out_of_range, duplicate_key, lone_surrogate, broken_json, not_an_object,
row_too_large.
"""

from __future__ import annotations

import io
import json
import math
import re
from collections.abc import Iterator
from typing import Any

from qwen3ft.data.readers.raw import RawRow, bad_row

MAX_DEPTH = 64
"""Most levels of lists and objects; the limit of Python's decoder depends on the caller's stack."""

_SUSPECT_ESCAPE = re.compile(r"\\u(?:[dD][89a-fA-F]|0000)")


class RejectedValueError(ValueError):
    """A value cannot be used; the message is the reason code."""


class JsonParser:
    """Decodes values and notes literals outside of JSON, such as NaN, instead of failing on them.

    Failing would lose where the value ends. A parser keeps state: each reader has its own.
    """

    def __init__(self) -> None:
        self._flaws: list[str] = []
        self._decoder = json.JSONDecoder(
            parse_constant=self._constant,
            parse_float=self._float,
            object_pairs_hook=self._object,
        )
        self._decode = self._decoder.decode
        self._raw_decode = self._decoder.raw_decode

    def parse_line(self, line: bytes) -> dict[str, Any]:
        """Return the object that `line` holds.

        Raises:
            RejectedValueError: with the reason code.
        """
        try:
            text = line.decode()
            value = self._decode(text)
        except (ValueError, RecursionError) as error:
            self._take_flaw()
            raise RejectedValueError("nul" if b"\0" in line else reason_of(error)) from None
        if self._flaws:
            raise RejectedValueError(self._take_flaw())
        return _checked_object(value, text)

    def parse_element(self, text: str, start: int) -> tuple[dict[str, Any], int, str]:
        """Return (object, end, '') of the value at `start`; ({}, end, reason code) if it is unfit.

        Raises:
            ValueError, RecursionError: it is broken, or goes on behind the end of `text`.
        """
        try:
            value, end = self._raw_decode(text, start)
        except (ValueError, RecursionError):
            self._take_flaw()
            raise
        own = text[start:end]
        try:
            if not own.isascii():
                own.encode()  # fails on the lone surrogates of bytes that were not UTF-8
            if self._flaws:
                raise RejectedValueError(self._take_flaw())
            return _checked_object(value, own), end, ""
        except ValueError as error:
            self._take_flaw()
            return {}, end, reason_of(error)

    def _take_flaw(self) -> str:
        """Return the first literal outside of JSON since the last call."""
        first = self._flaws[0] if self._flaws else ""
        self._flaws.clear()
        return first

    def _object(self, pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        value = dict(pairs)
        if len(value) != len(pairs):  # the last one would win
            self._flaws.append("duplicate_key")
        return value

    def _constant(self, _name: str) -> None:
        self._flaws.append("nan_literal")

    def _float(self, text: str) -> float:
        number = float(text)
        if math.isinf(number):  # 1e999 is JSON, but no number of Python
            self._flaws.append("number_out_of_range")
        return number


def reason_of(error: Exception) -> str:
    """Return the reason code for what the decoders raise."""
    if isinstance(error, RejectedValueError):
        return str(error)
    if isinstance(error, UnicodeError):
        return "invalid_utf8"
    if isinstance(error, RecursionError):
        return "too_deep"
    # Python reads no integer of more than 4300 digits.
    return "broken_json" if isinstance(error, json.JSONDecodeError) else "number_out_of_range"


def is_json(text: str) -> bool:
    """Return whether `text` is one JSON value."""
    try:
        json.loads(text)
    except (ValueError, RecursionError):
        return False
    return True


def _checked_object(value: Any, text: str) -> dict[str, Any]:
    """Return `value`, decoded from `text`, if it is an object fit to be a row.

    Raises:
        RejectedValueError: with the reason code.
    """
    if text.count("{") + text.count("[") > MAX_DEPTH and _is_deep(value):
        raise RejectedValueError("too_deep")
    if not isinstance(value, dict):
        raise RejectedValueError("not_an_object")
    # The decoder refuses a raw NUL or surrogate: only an escape can bring one in.
    if "\\u" in text and _SUSPECT_ESCAPE.search(text):
        for string in _strings(value):
            if "\0" in string:
                raise RejectedValueError("nul")
            try:
                string.encode()
            except UnicodeEncodeError:
                raise RejectedValueError("lone_surrogate") from None
    return value


def _is_deep(value: Any) -> bool:
    """Return whether lists and objects are nested more than `MAX_DEPTH` levels."""
    level = [value]
    for _ in range(MAX_DEPTH + 1):
        containers = [item for item in level if isinstance(item, (dict, list))]
        if not containers:
            return False
        level = [
            item
            for container in containers
            for item in (container.values() if isinstance(container, dict) else container)
        ]
    return True


def _strings(value: Any) -> Iterator[str]:
    """Yield every text inside `value`, at most `MAX_DEPTH` levels deep, and the names of fields."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict):
        yield from value
        for item in value.values():
            yield from _strings(item)
    elif isinstance(value, list):
        for item in value:
            yield from _strings(item)


def read_json_rows(stream: io.BufferedReader, offset: int, limit: int) -> Iterator[RawRow]:
    """Yield a row for each line that is not blank; never hold a line of more than `limit` bytes."""
    parse, number = JsonParser().parse_line, 0
    while line := stream.readline(limit):
        number += 1
        start, offset = offset, offset + len(line)
        if line == b"\n":
            blank = skip_blank_lines(stream)
            number, offset = number + blank, offset + blank
            continue
        if len(line) == limit and not line.endswith(b"\n"):
            offset += skip_line(stream, limit)
            yield bad_row(number, start, "row_too_large", line)
            continue
        try:
            yield RawRow(number, parse(line), offset=start)
        except RejectedValueError as error:
            if line.strip():
                yield bad_row(number, start, str(error), line)


def skip_blank_lines(stream: io.BufferedReader) -> int:
    """Read the newlines that come next in the buffer, all at once, and return how many."""
    head = stream.peek()
    return len(stream.read(len(head) - len(head.lstrip(b"\n"))))


def skip_line(stream: io.BufferedReader, limit: int) -> int:
    """Read up to the next newline, in pieces, and return how many bytes that was."""
    skipped = 0
    while rest := stream.readline(limit):
        skipped += len(rest)
        if rest.endswith(b"\n"):
            break
    return skipped
