"""One row as a reader found it: its values at their place, or the reason why there are none."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from qwen3ft.units import MIB

MAX_ROW_BYTES = 16 * MIB
"""Size of the largest row that is read; memory is bounded by a few times that."""

EXCERPT_BYTES = 1024
"""Most of a bad row that is kept, before it is masked and cut for the quarantine."""


@dataclass(slots=True)
class RawRow:
    """The values of one row by name, or the reason code why it has none."""

    line: int
    """Line of the file where the row starts, from 1; in parquet and sheets that of the row."""
    values: dict[str, Any] = field(default_factory=dict)
    reason: str = ""
    text: str = ""
    """The beginning of a bad row."""
    offset: int = -1
    """Byte of the uncompressed file where the row starts; -1 for parquet and sheets."""


class UnreadableFileError(Exception):
    """The file as a whole, or the rest of it, cannot be read."""


def usable_names(names: Sequence[str]) -> list[str]:
    """Return names of columns, with their places where there are none.

    pandas and R write the numbers of rows into a column without a name.
    """
    return [name if name.strip() else f"(column {at})" for at, name in enumerate(names, 1)]


def refuse_repeated(names: Sequence[str]) -> None:
    """Make sure that no two columns of a file have the same name.

    Raises:
        UnreadableFileError: some do; a row could hold the value of one of them only.
    """
    for name, times in Counter(names).items():
        if times > 1:
            places = [str(at) for at, other in enumerate(names, 1) if other == name]
            raise UnreadableFileError(
                f"columns {' and '.join(places)} are both called {name!r}; rename one of them"
            )


def bad_row(line: int, offset: int, reason: str, text: bytes | str) -> RawRow:
    """Return a row without values, with the beginning of `text`."""
    head = text[:EXCERPT_BYTES]
    # Bytes that are not UTF-8 are lone surrogates in a str.
    content = head if isinstance(head, bytes) else head.encode("utf-8", "surrogateescape")
    return RawRow(line, {}, reason, content.decode("utf-8", "replace"), offset)
