"""Rows of parquet files, read in batches of a bounded size.

Text that is not UTF-8 costs its row alone, although its type in Arrow promises UTF-8. A damaged
file ends in `UnreadableFileError` after the rows before; pages are checked against their checksums
where the file has any. Rows have a number, and no byte where they start.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from qwen3ft.data.readers.raw import EXCERPT_BYTES, RawRow, UnreadableFileError, refuse_repeated
from qwen3ft.units import MIB

_BATCH_ROWS = 1024
_BATCH_BYTES = 32 * MIB

ChooseColumns = Callable[[tuple[str, ...]], list[str]]
"""Function from all columns of a parquet file to those to read."""


class _NotText:
    """Placeholder for a value with bytes that are not UTF-8."""


def read_parquet(path: Path, choose: ChooseColumns, limit: int) -> Iterator[RawRow]:
    """Yield every row, with the columns that `choose` takes and at most `limit` bytes of text.

    Raises:
        UnreadableFileError: the file is damaged.
        OSError: it cannot be opened.
    """
    with path.open("rb") as stream:
        try:
            for number, values in enumerate(_rows(stream, choose), 1):
                yield _row(number, values, limit)
        except Exception as error:  # Arrow raises all kinds of errors on a damaged file
            if isinstance(error, OSError) and error.errno is not None:
                raise
            raise UnreadableFileError(f"{type(error).__name__}: {error}") from error


def _rows(stream: Any, choose: ChooseColumns) -> Iterator[dict[str, Any]]:
    import pyarrow.parquet as pq

    # pre_buffer takes memory to hide the latency of object stores; these are local files.
    with pq.ParquetFile(stream, page_checksum_verification=True, pre_buffer=False) as table:
        refuse_repeated(table.schema_arrow.names)
        columns = choose(tuple(table.schema_arrow.names))
        for group in range(table.num_row_groups):
            # By the size of its rows, uncompressed: 1,024 long documents would be too much.
            stated = table.metadata.row_group(group)
            row_bytes = max(1, stated.total_byte_size // max(1, stated.num_rows))
            batch_rows = max(1, min(_BATCH_ROWS, _BATCH_BYTES // row_bytes))
            for batch in table.iter_batches(batch_rows, row_groups=[group], columns=columns):
                names = batch.schema.names
                parts = [_python_values(batch.column(name)) for name in names]
                if not names:  # rows without a known column are counted all the same
                    yield from ({} for _ in range(batch.num_rows))
                for values in zip(*parts, strict=True):
                    yield dict(zip(names, values, strict=True))


def _python_values(column: Any) -> list[Any]:
    """Return the column as Python values; text as bytes, which need not be UTF-8."""
    import pyarrow as pa

    if pa.types.is_dictionary(column.type):
        column = column.dictionary_decode()
    if pa.types.is_string(column.type) or pa.types.is_large_string(column.type):
        column = column.cast(pa.large_binary())
    try:
        values: list[Any] = column.to_pylist()
    except UnicodeDecodeError:  # text inside lists or structures
        values = [_python_value(value) for value in column]
    return [_without_padding(value) for value in values] if column.type.num_fields else values


def _without_padding(value: Any) -> Any:
    """Return `value` without the fields that are null in a structure.

    Arrow gives all structures of a column the same fields: what one row lacks is null there, and a
    function call would be trained with arguments that nobody wrote.
    """
    if isinstance(value, dict):
        return {k: _without_padding(item) for k, item in value.items() if item is not None}
    return [_without_padding(item) for item in value] if isinstance(value, list) else value


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
    heads = {
        name: value[:EXCERPT_BYTES] if isinstance(value, (str, bytes)) else str(type(value))
        for name, value in values.items()
    }
    return RawRow(number, reason=reason, text=repr(heads)[:EXCERPT_BYTES])
