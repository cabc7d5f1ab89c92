"""What every reader of files gives: one raw row at its place, or a reason why there is none.

It knows no format; `formats` chooses the reader, `rows` says what the values mean.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

EXCERPT_BYTES = 1024
"""How much of a bad row is kept, before it is masked and cut for the quarantine."""


@dataclass(slots=True)
class RawRow:
    """What stands at one place: values by name, or the reason code why there are none."""

    line: int
    """1-based: the line of the file where the row starts; of parquet the row."""
    values: dict[str, Any] = field(default_factory=dict)
    reason: str = ""
    text: str = ""
    """The beginning of a bad row."""
    offset: int = -1
    """Byte of the uncompressed file where the row starts; -1 where there is no such thing."""


class UnreadableFileError(Exception):
    """The file as a whole, or the rest of it, cannot be read."""


def bad_row(line: int, offset: int, reason: str, text: bytes | str) -> RawRow:
    """A row without values; of `text` only the beginning is kept."""
    head = text[:EXCERPT_BYTES]
    shown = head.decode("utf-8", "replace") if isinstance(head, bytes) else _printable(head)
    return RawRow(line, reason=reason, text=shown, offset=offset)


def _printable(text: str) -> str:
    """`text` with the bytes that are no UTF-8, held as lone surrogates, replaced."""
    return text.encode("utf-8", "surrogateescape").decode("utf-8", "replace")
