"""Checked rows in an Arrow file of the work folder: written in order, read in batches or singly.

A million rows need no more memory than one batch, which is bounded in rows and in text; a row that
exceeds the bound has its own.
"""

from __future__ import annotations

import json
from bisect import bisect_right
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager
from functools import lru_cache
from itertools import accumulate
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qwen3ft.records.data import QaRow, SourceFile
from qwen3ft.units import MIB

if TYPE_CHECKING:
    import pyarrow as pa

BATCH_ROWS = 2000
"""Most rows written, read and tokenised at a time."""

_BATCH_CHARACTERS, _CACHED_BATCHES = 2 * MIB, 16

_TEXTS = ("question", "answer", "reasoning", "messages", "tools", "kind", "role")
_NUMBERS = ("source", "line", "offset")


class RowWriter(AbstractContextManager["RowWriter"]):
    """Appends rows to the file `path`; a context manager, complete when it is left."""

    def __init__(self, path: Path) -> None:
        import pyarrow as pa

        # Large: the offsets of a string are 32-bit, and a batch of large rows exceeds 2 GiB.
        texts = [(name, pa.large_string()) for name in _TEXTS]
        self._schema = pa.schema([*texts, *((name, pa.int64()) for name in _NUMBERS)])
        self._writer = pa.ipc.new_file(str(path), self._schema)  # a stream has no single batches
        self._columns: dict[str, list[Any]] = {name: [] for name in self._schema.names}
        self._characters = 0

    def __exit__(self, *_: object) -> None:
        self._flush()
        self._writer.close()

    def append(self, row: QaRow, source: int) -> None:
        """Write `row`; `source` is the number of its file."""
        texts = (row["question"], row["answer"], row["reasoning"])
        lists = (_to_text(row["messages"]), _to_text(row["tools"]))
        numbers = (source, row["line"], row["offset"])
        values = (*texts, *lists, row["kind"], row["role"], *numbers)  # in the order of the schema
        characters = sum(map(len, (*texts, *lists)))
        is_full = self._characters + characters > _BATCH_CHARACTERS
        if is_full or len(self._columns["line"]) == BATCH_ROWS:  # a giant row has its own batch
            self._flush()
        self._characters += characters
        for column, value in zip(self._columns.values(), values, strict=True):
            column.append(value)

    def _flush(self) -> None:
        import pyarrow as pa

        if self._columns["line"]:
            self._writer.write_batch(pa.record_batch(self._columns, schema=self._schema))
            self._columns = {name: [] for name in self._columns}
            self._characters = 0


class RowTable:
    """The rows of the file `path`, which were read from `files`."""

    def __init__(self, path: Path, files: Sequence[SourceFile]) -> None:
        import pyarrow as pa

        self._files = files
        with pa.memory_map(str(path)) as mapped:  # to count rows, no text is touched
            counted = pa.ipc.open_file(mapped)
            batches = range(counted.num_record_batches)
            rows = [counted.get_batch(number).num_rows for number in batches]
        self._starts = list(accumulate(rows, initial=0))
        # Read, not mapped: touched pages of a map would count as memory of this process.
        self._reader = pa.ipc.open_file(pa.OSFile(str(path)))
        self._batch = lru_cache(_CACHED_BATCHES)(self._reader.get_batch)

    def batches(self) -> Iterator[tuple[int, list[QaRow]]]:
        """Yield (position of the first row, rows) of each batch, in order."""
        for number, start in enumerate(self._starts[:-1]):
            yield start, self._rows(self._reader.get_batch(number))

    def rows(self, positions: Sequence[int]) -> list[QaRow]:
        """Return the rows at `positions`; neighbours are cheaper, for they share a batch."""
        found = []
        for position in positions:
            number = bisect_right(self._starts, position) - 1
            index = position - self._starts[number]
            found += self._rows(self._batch(number).slice(index, 1))
        return found

    def _rows(self, batch: pa.RecordBatch) -> list[QaRow]:
        columns = {name: batch.column(name).to_pylist() for name in batch.schema.names}
        numbers = zip(*(columns[name] for name in _NUMBERS), strict=True)
        return [
            QaRow(
                question=question,
                answer=answer,
                reasoning=reasoning,
                messages=json.loads(messages) if messages else [],
                tools=json.loads(tools) if tools else [],
                kind=kind,
                group="",  # its hash is in the keys
                role=role,
                file=self._files[number[0]].label,
                line=number[1],
                offset=number[2],
            )
            for question, answer, reasoning, messages, tools, kind, role, number in zip(
                *(columns[name] for name in _TEXTS), numbers, strict=True
            )
        ]


def _to_text(value: list[Any]) -> str:
    # As text: Arrow has one set of fields for a column, and messages of rows differ in theirs.
    return json.dumps(value, ensure_ascii=False) if value else ""
