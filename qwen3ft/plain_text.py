"""Text from outside, fit to be shown and compared.

Nothing in what is shown steers a terminal or turns the direction of the text.

Names of files, rows, messages of libraries and answers of models may hold escape sequences, which a
terminal obeys, marks that show a text in another order than it has, and halves of characters, which
cannot be written at all.
"""

from __future__ import annotations

import re
import unicodedata
from functools import cache
from typing import Literal

# C0 without tab and newline, DEL, C1; marks of Unicode's bidirectional algorithm, without which
# Arabic and Hebrew read right; separators of lines; halves of characters
_STEERING = (
    "\x00-\x08\x0b-\x1f\x7f-\x9f\u061c\u200e\u200f\u202a-\u202e\u2066-\u2069\u2028\u2029"
    "\ud800-\udfff"
)
_MOST_MARKS = 30
_STEERS = re.compile(f"[{_STEERING}]")
_STEERS_OR_BREAKS = re.compile(f"[\t\n{_STEERING}]")


def escaped(text: str) -> str:
    """Return `text` with every character that steers written as a Python escape."""
    return _STEERS.sub(lambda found: ascii(found.group())[1:-1], text)


def escaped_line(text: str) -> str:
    """Return `escaped(text)` without line breaks and tabs: for names in tables and links."""
    return _STEERS_OR_BREAKS.sub(lambda found: ascii(found.group())[1:-1], text)


def escaped_in_json(text: str) -> str:
    r"""Return JSON with every character that steers written as \u001b, which means the same."""
    return _STEERS.sub(lambda found: f"\\u{ord(found.group()):04x}", text)


def without_steering(text: str) -> str:
    """Return `text` without the characters that `escaped` escapes."""
    return _STEERS.sub("", text)


def is_plain(text: str) -> bool:
    """Return whether `text` is one line that may be shown as it is."""
    return _STEERS_OR_BREAKS.search(text) is None


def normalized(form: Literal["NFC", "NFKC"], text: str) -> str:
    """Return `text` in a Unicode normal form, without the marks of a character beyond the 30th.

    No language stacks more (UAX #15, stream-safe text), and to sort n of them takes n² steps.
    """
    if not text.isascii() and (stacks := _stacks()).search(text):
        text = stacks.sub(lambda found: found.group()[:_MOST_MARKS], text)
    return unicodedata.normalize(form, text)


@cache
def _stacks() -> re.Pattern[str]:
    """Return the pattern of more marks of one character than are kept."""
    marks = "".join(filter(unicodedata.combining, map(chr, range(0x300, 0x20000))))
    return re.compile(f"[{marks}]{{{_MOST_MARKS + 1},}}")
