"""Checked rows in a file of the work folder: written in order, read in batches or singly.

A million rows need no more memory than one batch, which is bounded in rows and in text; a row that
exceeds the bound has its own. A batch can be read once it is written, by another process too.
"""

from __future__ import annotations

import json
from bisect import bisect_right
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager
from functools import cached_property, lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from qwen3ft.records.data import QaRow, SourceFile
from qwen3ft.units import MIB

if TYPE_CHECKING:
    import pyarrow as pa

    from qwen3ft.data.splits import Mask

BATCH_ROWS = 2000
"""Most rows written, read and tokenised at a time."""

_BATCH_CHARACTERS, _CACHED_BATCHES = 2 * MIB, 16

_TEXTS = ("question", "answer", "reasoning", "messages", "tools", "kind", "group", "role")
_NUMBERS = ("source", "line", "offset")


class BatchPlace(NamedTuple):
    """Where a batch is: its first row's position and number of rows, and its bytes in the file."""

    start: int
    rows: int
    offset: int
    size_bytes: int


def _schema() -> pa.Schema:
    import pyarrow as pa

    # Large: the offsets of a string are 32-bit, and a batch of large rows exceeds 2 GiB.
    texts = [(name, pa.large_string()) for name in _TEXTS]
    return pa.schema([*texts, *((name, pa.int64()) for name in _NUMBERS)])


class RowWriter(AbstractContextManager["RowWriter"]):
    """Appends rows to the file `path`; a context manager, complete when it is left."""

    def __init__(self, path: Path) -> None:
        import pyarrow as pa

        self._file = pa.OSFile(str(path), "wb")
        self._schema = _schema()
        self._held: list[tuple[Any, ...]] = []
        """Rows of the batch to come, each in the order of the schema."""
        self._characters = self._rows = 0

    def __exit__(self, *_: object) -> None:
        self._file.close()

    def append(self, row: QaRow, source: int) -> BatchPlace | None:
        """Add `row`, from the file with the number `source`; return the batch before it if full."""
        question, answer, reasoning = row["question"], row["answer"], row["reasoning"]
        messages, tools = _to_text(row["messages"]), _to_text(row["tools"])
        characters = len(question) + len(answer) + len(reasoning) + len(messages) + len(tools)
        is_full = self._characters + characters > _BATCH_CHARACTERS
        # A giant row has its own batch.
        written = self.flush() if is_full or len(self._held) == BATCH_ROWS else None
        self._characters += characters
        labels = (row["kind"], row["group"], row["role"])
        numbers = (source, row["line"], row["offset"])
        self._held.append((question, answer, reasoning, messages, tools, *labels, *numbers))
        return written

    def flush(self) -> BatchPlace | None:
        """Write the rows appended since the last batch as one; None if there are none."""
        import pyarrow as pa

        if not self._held:
            return None
        columns = dict(zip(self._schema.names, zip(*self._held, strict=True), strict=True))
        content = pa.record_batch(columns, schema=self._schema).serialize()
        place = BatchPlace(self._rows, len(self._held), self._file.tell(), content.size)
        self._file.write(content)
        self._rows += len(self._held)
        self._held, self._characters = [], 0
        return place


class BatchReader:
    """Reads batches of the file `path`, whose rows come from `files`."""

    def __init__(self, path: Path, files: Sequence[SourceFile]) -> None:
        self._path, self._files = path, files

    @cached_property
    def _file(self) -> pa.NativeFile:
        import pyarrow as pa

        # Read, not mapped: touched pages of a map would count as memory of this process.
        return pa.OSFile(str(self._path))

    def batch(self, place: BatchPlace) -> pa.RecordBatch:
        """Return the batch at `place` as Arrow's columns."""
        import pyarrow as pa

        content = pa.py_buffer(self._file.read_at(place.size_bytes, place.offset))
        return pa.ipc.read_record_batch(content, _schema())

    def rows(self, place: BatchPlace) -> list[QaRow]:
        """Return the rows of the batch at `place`."""
        return self.as_rows(self.batch(place))

    def as_rows(self, batch: pa.RecordBatch) -> list[QaRow]:
        """Return the rows of a batch, or of a part of it."""
        columns = {name: batch.column(name).to_pylist() for name in batch.schema.names}
        numbers = zip(*(columns[name] for name in _NUMBERS), strict=True)
        labels = [file.label for file in self._files]
        return [
            {
                "question": question,
                "answer": answer,
                "reasoning": reasoning,
                "messages": json.loads(messages) if messages else [],
                "tools": json.loads(tools) if tools else [],
                "kind": kind,
                "group": group,
                "role": role,
                "file": labels[source],
                "line": line,
                "offset": offset,
            }
            for question, answer, reasoning, messages, tools, kind, group, role, (
                source,
                line,
                offset,
            ) in zip(*(columns[name] for name in _TEXTS), numbers, strict=True)
        ]

    def lines(self, batch: pa.RecordBatch) -> Iterator[tuple[str, int]]:
        """Yield the file and the line of each row of a batch, without its texts."""
        sources, lines = (batch.column(name).to_pylist() for name in ("source", "line"))
        return zip((self._files[source].label for source in sources), lines, strict=True)


class RowTable:
    """All rows of a file that is complete.

    Args:
        reader: Reader of the file.
        places: Its batches, in order.
    """

    def __init__(self, reader: BatchReader, places: Sequence[BatchPlace]) -> None:
        self._reader, self.places = reader, places
        self._starts = [place.start for place in places]
        self._batch = lru_cache(_CACHED_BATCHES)(reader.batch)

    def batches(self) -> Iterator[tuple[int, list[QaRow]]]:
        """Yield (position of the first row, rows) of each batch, in order."""
        for place in self.places:
            yield place.start, self._reader.rows(place)

    def rows(self, positions: Sequence[int]) -> list[QaRow]:
        """Return the rows at `positions`; neighbours are cheaper, for they share a batch."""
        found = []
        for position in positions:
            place = self.places[bisect_right(self._starts, position) - 1]
            one = self._batch(place).slice(position - place.start, 1)
            found += self._reader.as_rows(one)
        return found

    def rows_where(self, wanted: Mask) -> Iterator[tuple[int, QaRow]]:
        """Yield (position, row) of the rows of the mask, in order."""
        for positions, batch in self._where(wanted):
            yield from zip(positions, self._reader.as_rows(batch), strict=True)

    def lines_where(self, wanted: Mask) -> Iterator[tuple[int, tuple[str, int]]]:
        """Yield (position, (file, line)) of the rows of the mask, in order."""
        for positions, batch in self._where(wanted):
            yield from zip(positions, self._reader.lines(batch), strict=True)

    def _where(self, wanted: Mask) -> Iterator[tuple[list[int], pa.RecordBatch]]:
        """Yield the rows of the mask, batch by batch, with their positions."""
        for place in self.places:
            inside = np.flatnonzero(wanted[place.start : place.start + place.rows])
            if len(inside):
                yield (place.start + inside).tolist(), self._reader.batch(place).take(inside)


def _to_text(value: list[Any]) -> str:
    # As text: Arrow has one set of fields for a column, and messages of rows differ in theirs.
    return json.dumps(value, ensure_ascii=False) if value else ""
