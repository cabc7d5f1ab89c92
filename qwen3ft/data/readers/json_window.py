"""A stretch of a file as text that moves forward, and where a broken JSON element in it ends.

Guarantees: bytes that are no UTF-8 stay in the text as lone surrogates (surrogateescape), so that
they cost one element; offsets and lines stay exact. Text behind the position is forgotten.

A broken element ends where its brackets balance, or where another one plausibly starts, whichever
comes first: an object that starts with the same field as earlier ones, or on a new line as far in.
In sound JSON neither can stand inside a text, whose quotes and newlines are escaped; an object
nested in the element is told apart by its fields. This is a heuristic: a broken element may come
out as two bad rows, and a sound one behind it may be lost to it where all these signs are missing.
"""

from __future__ import annotations

import codecs
import io
import re
from collections.abc import Callable

from qwen3ft.data.readers.raw import UnreadableFileError

IsOther = Callable[[int], bool]
"""Whether what stands at an index of the window's text is known to be no element."""

CHUNK_BYTES = 2**20
_FIRST_REACH = 4096
"""How far the end of a broken element is looked for at first, in characters."""
_OVERLAP = 512
"""The start of an element is looked for again this far back, for it may have been cut."""
_OUTSIDE = re.compile(r'["{}\[\],]')
_INSIDE = re.compile(r'["\\]')
_BETWEEN = re.compile(r"[ \t\r\n,]*")
ELEMENT_ENDS = re.compile(r"\s*(?:[,\]{]|$)")
"""What may stand behind an element; the end of the text may be that of what was read so far."""
_LIST_ENDS = re.compile(r'\s*(?:$|\}\s*$|,\s*"[^"\\]*"\s*:[^{]*\}\s*$)')
_FIRST_FIELD = re.compile(r'\{\s*"([^"\\]{1,128})"\s*:')
_MOST_FIRST_FIELDS = 16


def size_bytes(text: str) -> int:
    """How many bytes of the file `text` was."""
    return len(text) if text.isascii() else len(text.encode("utf-8", "surrogateescape"))


class Window:
    """`text[at:]` is what was read and not consumed yet; `offset` and `line` are those of `at`."""

    def __init__(self, stream: io.BufferedReader, offset: int) -> None:
        self.text, self.at = "", 0
        self.offset, self.line = offset, 1
        self._stream = stream
        self._decoder = codecs.getincrementaldecoder("utf-8")("surrogateescape")
        self.has_ended = False
        self._failure: UnreadableFileError | None = None

    @property
    def held(self) -> int:
        """Characters that were read and not consumed."""
        return len(self.text) - self.at

    def grow(self) -> bool:
        """Read as much again as is held, from 1 to 8 times `CHUNK_BYTES`; whether there was any.

        Raises:
            UnreadableFileError: the stream broke off, and all before was given.
        """
        if self.has_ended:
            if self._failure is not None:
                raise self._failure
            return False
        missing = min(max(CHUNK_BYTES, self.held), 8 * CHUNK_BYTES)
        pieces = []
        try:
            while missing > 0:
                piece = self._stream.read1(missing)
                if not piece:
                    self.has_ended = True
                    break
                pieces.append(piece)
                missing -= len(piece)
        except UnreadableFileError as error:
            self._failure, self.has_ended = error, True
        fresh = self._decoder.decode(b"".join(pieces), final=self.has_ended)
        self.text, self.at = self.text[self.at :] + fresh, 0
        if not fresh and self._failure is not None:
            raise self._failure
        return bool(fresh)

    def move(self, to: int) -> None:
        """Consume the text up to index `to`."""
        passed = self.text[self.at : to]
        self.line += passed.count("\n")
        self.offset += size_bytes(passed)
        self.at = to

    def skip(self, between: re.Pattern[str] = _BETWEEN) -> str:
        """Consume white space and commas; the character behind them, '' at the end of the file."""
        while True:
            match = between.match(self.text, self.at)
            self.move(match.end() if match else self.at)
            if self.held:
                return self.text[self.at]
            if not self.grow():
                return ""


class Starts:
    """What the start of an element looks like, learned from the sound ones."""

    def __init__(self) -> None:
        self._fields: dict[str, frozenset[str]] = {}
        """First fields seen, each with all fields of the element that it was first seen in."""
        self._indent: str | None = None
        self._pattern: re.Pattern[str] | None = None

    def learn(self, value: dict[str, object], text: str, start: int) -> None:
        """Take note of a sound element at `text[start]`."""
        first = next(iter(value), None)
        if first is None or first in self._fields or len(self._fields) >= _MOST_FIRST_FIELDS:
            return
        if not self._fields:
            line_start = text.rfind("\n", max(0, start - 256), start) + 1
            if line_start and not text[line_start:start].strip(" \t"):
                self._indent = text[line_start:start]
        self._fields[first] = frozenset(value)
        self._pattern = None

    def find(self, text: str, low: int, high: int, own: str, is_other: IsOther) -> int:
        """Index of the first plausible start in `text[low:high]`, or -1.

        Args:
            text: Where to look.
            low: First index that may be one.
            high: End of the stretch.
            own: The text of the broken element; its first field counts as one of a start.
            is_other: Whether what stands at an index is known to be something else.
        """
        for match in self._compiled(own).finditer(text, low, high):
            if not is_other(match.start()):
                return match.start()
        return -1

    def looks_other(self, value: object) -> bool:
        """Whether a sound value has too few fields of the elements that start like it."""
        if not isinstance(value, dict):
            return True
        usual = self._fields.get(next(iter(value), ""), frozenset())
        return 2 * len(usual & value.keys()) < len(usual)

    def _compiled(self, own: str) -> re.Pattern[str]:
        mine = _FIRST_FIELD.match(own)
        if self._pattern is not None and (mine is None or mine[1] in self._fields):
            return self._pattern
        fields = {*self._fields, mine[1]} if mine else {*self._fields}
        names = "|".join(re.escape(name) for name in sorted(fields)) or '[^"\\\\]{1,128}'
        pattern = rf'\{{\s*"(?:{names})"\s*:'
        if self._indent is not None:
            pattern += rf"|(?<=\n{re.escape(self._indent)})\{{"
        compiled = re.compile(pattern)
        if fields == self._fields.keys():
            self._pattern = compiled
        return compiled


class Balance:
    """Where the brackets that a broken element opens are closed; goes on over several stretches."""

    def __init__(self) -> None:
        self._open: list[str] = []
        self._is_inside = False

    def scan(self, text: str, low: int, high: int) -> tuple[int, int]:
        """(index behind the element or -1, index to go on at) in `text[low:high]`."""
        at = low
        while match := (_INSIDE if self._is_inside else _OUTSIDE).search(text, at, high):
            at, sign = match.end(), match[0]
            if sign == "\\":
                at += 1
            elif sign == '"':
                self._is_inside = not self._is_inside
            elif sign in "{[":
                self._open.append(sign)
            elif sign == ",":
                if not self._open:
                    return at - 1, at
            elif self._close("{" if sign == "}" else "["):
                if not self._open and ELEMENT_ENDS.match(text, at):
                    return at, at
            elif sign == "]" and _LIST_ENDS.match(text, at):
                return at - 1, at
        return -1, max(at, high)

    def _close(self, opened: str) -> bool:
        """Close the last bracket of this kind, and what is still open inside; False if none is."""
        if opened in self._open:
            while self._open.pop() != opened:
                pass
            return True
        # One too many, after the quotes of a text were taken for its end.
        return opened == "{" and not self._open


def end_of_broken(
    window: Window, starts: Starts, is_other: IsOther, limit: int
) -> tuple[str, int, bool]:
    """Consume the broken element at the window's position, if it has an end.

    Args:
        window: Where it starts.
        starts: What other elements start like.
        is_other: Whether a plausible start at an index of the window's text is none.
        limit: Most characters of it that are held.

    Returns:
        Its text (the beginning, if it is longer than `limit`), how many characters it has, and
        whether it has an end; if not, it is all the rest, the last part of which is not consumed.
    """
    balance, reach, head, length = Balance(), _FIRST_REACH, "", 0
    scanned = searched = 1  # relative to the window's position
    # The element's own first bracket is no start of another one.
    balance.scan(window.text, window.at, window.at + 1)
    while True:
        base, stop = window.at, min(window.at + reach, len(window.text))
        own = head or window.text[base : base + _OVERLAP]
        start = starts.find(window.text, base + searched, stop, own, is_other)
        end, resume = balance.scan(window.text, base + scanned, start if start >= 0 else stop)
        found = end if end >= 0 else start
        if found >= 0:
            head = head or window.text[base:found]
            window.move(found)
            return head, length + found - base, True
        scanned, searched = resume - base, max(searched, stop - base - _OVERLAP)
        if stop < len(window.text):
            reach *= 4
        elif window.held > limit + _OVERLAP:
            head = own
            length += window.held - _OVERLAP
            window.move(stop - _OVERLAP)
            scanned, searched = resume - window.at, 0
        elif not window.grow():
            return head or window.text[base:], length + window.held, False
        else:
            reach *= 4
