"""Rows of parquet files, column by column from disk, a bounded batch at a time.

Guarantees: text that is no UTF-8, though Arrow's type says so, costs its row alone; a file that is
damaged or cut short is `UnreadableFileError`, after the rows before; pages are checked against
their checksums where the file has any. A batch is at most `BATCH_BYTES`, as far as the file's own
sizes tell. Rows have a number, and no byte where they start.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from qwen3ft.data.readers.raw import EXCERPT_BYTES, RawRow, UnreadableFileError
from qwen3ft.units import MIB

BATCH_ROWS = 1024
BATCH_BYTES = 32 * MIB

ChooseColumns = Callable[[tuple[str, ...]], list[str]]
"""Given the columns of a parquet file, which of them to read."""


class _NotText:
    """Stands for a value that holds bytes that are no UTF-8."""


def read_parquet(path: Path, choose: ChooseColumns, limit: int) -> Iterator[RawRow]:
    """One row a row, of the columns that `choose` takes.

    Args:
        path: The file.
        choose: Called once with all columns' names.
        limit: Most bytes of text in one row.

    Raises:
        UnreadableFileError: the file is damaged.
        OSError: it cannot be opened.
    """
    with path.open("rb") as stream:
        rows = _rows(stream, choose)
        number = 0
        while True:
            try:
                values = next(rows)
            except StopIteration:
                return
            except Exception as error:  # a damaged file raises whatever it hits
                if isinstance(error, OSError) and error.errno is not None:
                    raise
                raise UnreadableFileError(f"{type(error).__name__}: {error}") from error
            number += 1
            yield _row(number, values, limit)


def _rows(stream: Any, choose: ChooseColumns) -> Iterator[dict[str, Any]]:
    import pyarrow.parquet as pq

    with pq.ParquetFile(stream, page_checksum_verification=True, pre_buffer=False) as table:
        columns = choose(tuple(table.schema_arrow.names))
        for group in range(table.num_row_groups):
            stated = table.metadata.row_group(group)
            row_bytes = max(1, stated.total_byte_size // max(1, stated.num_rows))
            batch_rows = max(1, min(BATCH_ROWS, BATCH_BYTES // row_bytes))
            for batch in table.iter_batches(batch_rows, row_groups=[group], columns=columns):
                parts = [_python_values(batch.column(name)) for name in batch.schema.names]
                names = batch.schema.names
                if not names:
                    yield from ({} for _ in range(batch.num_rows))
                for values in zip(*parts, strict=True):
                    yield dict(zip(names, values, strict=True))


def _python_values(column: Any) -> list[Any]:
    """The column as Python values; text as bytes, for Arrow does not promise that it is UTF-8."""
    import pyarrow as pa

    if pa.types.is_dictionary(column.type):
        column = column.dictionary_decode()
    if pa.types.is_string(column.type) or pa.types.is_large_string(column.type):
        column = column.cast(pa.large_binary())
    try:
        values: list[Any] = column.to_pylist()
    except UnicodeDecodeError:  # text inside lists or structures
        values = [_python_value(value) for value in column]
    return values


def _python_value(scalar: Any) -> Any:
    try:
        return scalar.as_py()
    except UnicodeDecodeError:
        return _NotText()


def _row(number: int, values: dict[str, Any], limit: int) -> RawRow:
    size, reason = 0, ""
    try:
        for name, value in values.items():
            if isinstance(value, bytes):
                size += len(value)
                values[name] = value.decode()
                if b"\0" in value:
                    reason = "nul"
            elif isinstance(value, _NotText):
                reason = "invalid_utf8"
    except UnicodeDecodeError:
        reason = "invalid_utf8"
    if size > limit:
        reason = "row_too_large"
    if not reason:
        return RawRow(number, values)
    shown = {
        name: value[:EXCERPT_BYTES] if isinstance(value, (str, bytes)) else str(type(value))
        for name, value in values.items()
    }
    return RawRow(number, reason=reason, text=repr(shown)[:EXCERPT_BYTES])
