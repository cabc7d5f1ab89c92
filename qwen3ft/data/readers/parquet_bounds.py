"""Sizes that a parquet file states about itself, checked before Arrow reserves memory for them.

Arrow reserves what the header of a page states, before it reads the page, and follows the schema as
deep as it goes. Headers and footer are structures of Thrift's compact protocol
(github.com/apache/parquet-format).
"""

from __future__ import annotations

import io
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from qwen3ft.data.readers.raw import UnreadableFileError
from qwen3ft.units import MIB

MOST_HELD_BYTES = 256 * MIB
"""Most that the current pages of all columns take."""
MOST_VALUES = 16 * 2**20
"""Most values of a column in a row group, beyond one for each of its rows."""
_MOST_FOOTER_BYTES, _MOST_LEVELS, _MOST_COLUMNS, _MOST_PAGES = 16 * MIB, 100, 10_000, 100_000
_HEADER_BYTES = (2**12, MIB)  # tried one after the other: statistics may be long
_MAGIC = b"PAR1"


@dataclass
class ColumnSizes:
    """Sizes of a column in a row group."""

    dictionary_bytes: int = 0
    page_bytes: int = 0
    """Largest page, as it is stored and unpacked, together."""
    values: int = 0


def check_footer(stream: io.BufferedReader) -> None:
    """Make sure that Arrow can open the file: its schema is neither deep nor wide.

    Raises:
        UnreadableFileError: it is, or is no schema.
    """
    size = stream.seek(0, io.SEEK_END)
    stream.seek(max(0, size - 8))
    end = stream.read(8)
    if end[4:] != _MAGIC:
        raise UnreadableFileError("it does not end as a parquet file does")
    length = int.from_bytes(end[:4], "little")
    if length > _MOST_FOOTER_BYTES:
        raise UnreadableFileError(
            f"its footer takes {length // MIB:,} MiB, and may take {_MOST_FOOTER_BYTES // MIB}; "
            "write it with larger row groups"
        )
    stream.seek(max(0, size - 8 - length))
    open_children: list[int] = []
    for element in _schema(_Compact(stream.read(length))):
        while open_children and open_children[-1] == 0:
            open_children.pop()
        if open_children:
            open_children[-1] -= 1
        open_children.append(int(element.get(5, 0)))
        if len(open_children) > _MOST_LEVELS:
            raise UnreadableFileError(f"its columns are nested more than {_MOST_LEVELS} levels")
    stream.seek(0)


def column_sizes(stream: io.BufferedReader, column: Any) -> ColumnSizes:
    """Return what the headers of a column's pages state.

    Args:
        stream: The file.
        column: Arrow's metadata of the column in a row group.

    Raises:
        UnreadableFileError: a header cannot be read.
    """
    start, sizes = column.data_page_offset, ColumnSizes()
    if column.has_dictionary_page and 0 < (column.dictionary_page_offset or 0) < start:
        start = column.dictionary_page_offset
    at, pages = start, 0
    while at < start + column.total_compressed_size and sizes.values < column.num_values:
        header, length = _page_header(stream, at)
        unpacked, packed = int(header[2]), int(header[3])
        pages += 1
        if packed < 0 or unpacked < 0 or pages > _MOST_PAGES:
            raise UnreadableFileError(f"it has more than {_MOST_PAGES:,} pages, or one of no size")
        if 7 in header:
            sizes.dictionary_bytes = max(sizes.dictionary_bytes, unpacked)
        else:
            sizes.values += max(0, int((header.get(5) or header.get(8) or {}).get(1, 0)))
        sizes.page_bytes = max(sizes.page_bytes, unpacked + packed)
        at += length + packed
    return sizes


def _page_header(stream: io.BufferedReader, at: int) -> tuple[dict[int, Any], int]:
    """Return the fields of the header at `at`, and its length."""
    for size in _HEADER_BYTES:
        stream.seek(at)
        compact = _Compact(stream.read(size))
        try:
            header = compact.structure()
            return {2: header[2], 3: header[3], **header}, compact.at
        except (IndexError, KeyError):
            continue
    raise UnreadableFileError(f"the header of the page at byte {at} cannot be read")


def _schema(compact: _Compact) -> Iterator[dict[int, Any]]:
    """Yield the elements of the schema at the beginning of a footer."""
    try:
        for number, kind in compact.fields():
            if number != 2:
                compact.value(kind)
                continue
            count, kind = compact.list_head()
            if count > _MOST_COLUMNS:
                raise UnreadableFileError(f"it has {count:,} columns, more than {_MOST_COLUMNS:,}")
            for _ in range(count):
                yield compact.value(kind)
            return
    except (IndexError, TypeError, AttributeError) as error:
        raise UnreadableFileError("its footer cannot be read") from error


class _Compact:
    """Reads values of Thrift's compact protocol; raises IndexError at the end of the data."""

    def __init__(self, data: bytes) -> None:
        self._data, self.at, self._level = data, 0, 0

    def structure(self) -> dict[int, Any]:
        """Return the fields of a structure by number."""
        self._level += 1
        if self._level > _MOST_LEVELS:
            raise IndexError
        found = {number: self.value(kind) for number, kind in self.fields()}
        self._level -= 1
        return found

    def fields(self) -> Iterator[tuple[int, int]]:
        """Yield number and kind of each field; the value must be read before the next one."""
        number = 0
        while head := self._byte():
            number = number + (head >> 4) if head >> 4 else self._integer()
            yield number, head & 15

    def value(self, kind: int) -> Any:
        """Return a value of that kind."""
        if kind in (1, 2):  # true, false: in a field without a byte of its own
            return kind == 1
        if kind in (4, 5, 6):
            return self._integer()
        if kind == 12:
            return self.structure()
        if kind in (9, 10):
            count, kind = self.list_head()
            return [self._byte() if kind in (1, 2) else self.value(kind) for _ in range(count)]
        if kind == 11:
            count = self._unsigned()
            kinds = self._byte() if count else 0
            return [(self.value(kinds >> 4), self.value(kinds & 15)) for _ in range(count)]
        skipped = {3: 1, 7: 8}[kind] if kind in (3, 7) else self._unsigned()
        self.at += skipped
        if self.at > len(self._data):
            raise IndexError
        return None  # numbers of one byte, fractions and texts are of no use here

    def list_head(self) -> tuple[int, int]:
        """Return count and kind of the values of a list."""
        head = self._byte()
        return (head >> 4 if head >> 4 < 15 else self._unsigned()), head & 15

    def _byte(self) -> int:
        self.at += 1
        return self._data[self.at - 1]

    def _unsigned(self) -> int:
        value = shift = 0
        while True:
            byte = self._byte()
            value |= (byte & 127) << shift
            shift += 7
            if byte < 128:
                return value
            if shift > 63:
                raise IndexError

    def _integer(self) -> int:
        value = self._unsigned()
        return (value >> 1) ^ -(value & 1)
