"""Text from outside made fit to be shown: nothing in it steers a terminal or turns its direction.

Names of files, rows, messages of libraries and answers of models may hold escape sequences, which a
terminal obeys, marks that show a text in another order than it has, and halves of characters, which
cannot be written at all.
"""

from __future__ import annotations

import re

# C0 without tab and newline, DEL, C1; marks of Unicode's bidirectional algorithm, without which
# Arabic and Hebrew read right; separators of lines; halves of characters
_STEERING = (
    "\x00-\x08\x0b-\x1f\x7f-\x9f\u061c\u200e\u200f\u202a-\u202e\u2066-\u2069\u2028\u2029"
    "\ud800-\udfff"
)
_STEERS = re.compile(f"[{_STEERING}]")
_STEERS_OR_BREAKS = re.compile(f"[\t\n{_STEERING}]")


def escaped(text: str) -> str:
    """Return `text` with every character that steers written as a Python escape."""
    return _STEERS.sub(lambda found: ascii(found.group())[1:-1], text)


def escaped_line(text: str) -> str:
    """Return `escaped(text)` without line breaks and tabs: for names in tables and links."""
    return _STEERS_OR_BREAKS.sub(lambda found: ascii(found.group())[1:-1], text)


def without_steering(text: str) -> str:
    """Return `text` without the characters that `escaped` escapes."""
    return _STEERS.sub("", text)


def is_plain(text: str) -> bool:
    """Return whether `text` is one line that may be shown as it is."""
    return _STEERS_OR_BREAKS.search(text) is None
