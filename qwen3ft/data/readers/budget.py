"""Bounds on what comes out of one packed file, and on the time that its rows take."""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path

from qwen3ft.data.readers.raw import RawRow, UnreadableFileError
from qwen3ft.data.readers.text import Conversion
from qwen3ft.units import MIB

FREE_BYTES, BYTES_PER_PACKED_BYTE = 64 * MIB, 200
"""A packed file may give so many bytes, and so many for each of its own; texts give 3 to 30."""

FREE_ROWS, PACKED_BYTES_PER_ROW = 200_000, 2
"""It may give so many rows, and one for each so many of its bytes; rows take 20 or more."""

FREE_SECONDS, BYTES_PER_SECOND = 60.0, 50_000
"""It may take so many seconds of CPU time, and one for each so many of its bytes; usual are 10⁷."""

_LOOK_ROWS = 256


class UnpackedBytes:
    """Counts the bytes that come out of a packed file of `packed_bytes`."""

    def __init__(self, packed_bytes: int) -> None:
        self._packed_bytes = packed_bytes
        self._left_bytes = FREE_BYTES + BYTES_PER_PACKED_BYTE * packed_bytes

    def add(self, size_bytes: int) -> None:
        """Count some more.

        Raises:
            UnreadableFileError: it is more than such a file may give.
        """
        self._left_bytes -= size_bytes
        if self._left_bytes < 0:
            most = FREE_BYTES + BYTES_PER_PACKED_BYTE * self._packed_bytes
            raise _given_too_much(self._packed_bytes, f"{most // MIB:,} MiB")


def bounded(
    rows: Iterator[RawRow], path: Path, conversion: Conversion, *, is_packed: bool
) -> Iterator[RawRow]:
    """Yield `rows`, which are read from `path`, until they are too many or took too long.

    Those of a converted file get their places on the way: another step would take its time.

    Raises:
        UnreadableFileError: they are, or did.
    """
    size_bytes = path.stat().st_size
    most_rows = FREE_ROWS + size_bytes // PACKED_BYTES_PER_ROW
    most_seconds = FREE_SECONDS + size_bytes / BYTES_PER_SECOND
    end = time.thread_time() + most_seconds
    for number, row in enumerate(rows, 1):
        if is_packed and number > most_rows:
            raise _given_too_much(size_bytes, f"{most_rows:,} rows")
        if conversion.text is not None:
            conversion.text.place(row)
        yield row
        if number % _LOOK_ROWS == 0 and time.thread_time() > end:
            raise UnreadableFileError(
                f"its first {number:,} rows took {most_seconds:,.0f} s of CPU time, and the rest "
                "is not read; split it into smaller files"
            )


def _given_too_much(packed_bytes: int, given: str) -> UnreadableFileError:
    return UnreadableFileError(
        f"its {packed_bytes:,} bytes unpack to more than {given}; the rest is not read; if that "
        "is on purpose, unpack it to JSON lines"
    )
