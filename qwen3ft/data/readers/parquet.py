"""Rows of parquet files, read in batches of a bounded size.

Many rows may share one value, which is stored once: they are counted by the bytes that they hold,
not by those of the file, and one that holds more than a row may is never made. Text that is not
UTF-8 costs its row alone, although its type in Arrow promises UTF-8. A damaged file ends in
`UnreadableFileError` after the rows before; pages are checked against their checksums where the
file has any. Rows have a number, and no byte where they start.
"""

from __future__ import annotations

import io
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from qwen3ft.data.readers.budget import UnpackedBytes
from qwen3ft.data.readers.parquet_bounds import (
    MOST_HELD_BYTES,
    MOST_VALUES,
    check_footer,
    column_sizes,
)
from qwen3ft.data.readers.raw import EXCERPT_BYTES, RawRow, UnreadableFileError, refuse_repeated
from qwen3ft.units import MIB

_BATCH_ROWS = 1024
_BATCH_BYTES = 32 * MIB
_SHARED_BYTES = 128 * MIB
"""Most that a batch takes if each of its rows holds the longest values that rows may share."""
_SMALL_DICTIONARY_BYTES = 64 * 2**10
"""More is not copied for each row that shares it, or looked at first."""
_VALUE_BYTES, _NESTED_BYTES = 16, 64
"""Memory of a value besides its text, and of a list or structure besides its values, in Python."""

ChooseColumns = Callable[[tuple[str, ...]], list[str]]
"""Function from all columns of a parquet file to those to read."""


class _NotText:
    """Placeholder for a value with bytes that are not UTF-8."""


def read_parquet(path: Path, choose: ChooseColumns, limit: int) -> Iterator[RawRow]:
    """Yield every row, with the columns that `choose` takes and at most `limit` bytes.

    Raises:
        UnreadableFileError: the file is damaged, or takes more memory than reading may.
        OSError: it cannot be opened.
    """
    # Arrow reads in threads of its own, so that headers are read by a second stream.
    with path.open("rb") as stream, path.open("rb") as headers:
        try:
            check_footer(headers)
            unpacked_bytes = UnpackedBytes(path.stat().st_size)
            rows = (
                row
                for batch in _batches(stream, headers, choose)
                for row in _batch_rows(batch, limit, unpacked_bytes)
            )
            for number, row in enumerate(rows, 1):
                row.line = number
                yield row
        except UnreadableFileError:
            raise
        except Exception as error:  # Arrow raises all kinds of errors on a damaged file
            if isinstance(error, OSError) and error.errno is not None:
                raise
            raise UnreadableFileError(f"{type(error).__name__}: {error}") from error


def _batches(
    stream: io.BufferedReader, headers: io.BufferedReader, choose: ChooseColumns
) -> Iterator[Any]:
    """Yield Arrow's batches, none of which takes much memory."""
    table = _open(stream, ())
    refuse_repeated(table.schema_arrow.names)
    columns, kept = choose(tuple(table.schema_arrow.names)), frozenset[str]()
    for group in range(table.num_row_groups):
        batch_rows, needed = _plan_group(stream, headers, table, group, columns)
        if not needed <= kept:
            kept |= needed
            table = _open(stream, kept)
        yield from table.iter_batches(batch_rows, row_groups=[group], columns=columns)


def _open(stream: io.BufferedReader, kept: Iterable[str]) -> Any:
    """Open the file; values of the columns `kept` are not copied for each row that shares them."""
    import pyarrow.parquet as pq

    return pq.ParquetFile(
        stream, page_checksum_verification=True, pre_buffer=False, read_dictionary=sorted(kept)
    )


def _plan_group(
    stream: io.BufferedReader,
    headers: io.BufferedReader,
    table: Any,
    group: int,
    columns: Sequence[str],
) -> tuple[int, frozenset[str]]:
    """Return rows of a batch, and the columns whose values must not be copied for each row.

    Raises:
        UnreadableFileError: the row group takes too much memory.
    """
    stated = table.metadata.row_group(group)
    held_bytes = shared_bytes = 0
    kept, large = set[str](), set[str]()
    for number in range(stated.num_columns):
        column = stated.column(number)
        path = column.path_in_schema
        if path not in columns and not any(path.startswith(f"{name}.") for name in columns):
            continue
        sizes = column_sizes(headers, column)
        held_bytes += sizes.page_bytes + sizes.dictionary_bytes
        is_nested = table.schema.column(number).max_repetition_level > 0
        if is_nested and sizes.values > MOST_VALUES + stated.num_rows:
            raise UnreadableFileError(f"row group {group} has {sizes.values:,} values in {path}")
        is_text = column.physical_type == "BYTE_ARRAY"
        if is_text and sizes.dictionary_bytes > _SMALL_DICTIONARY_BYTES:
            (large if path in columns else kept).add(path)
        else:
            shared_bytes += sizes.dictionary_bytes
    if held_bytes > MOST_HELD_BYTES:
        raise UnreadableFileError(
            f"the pages of row group {group} take {held_bytes // MIB:,} MiB at once, and may take "
            f"{MOST_HELD_BYTES // MIB}; write it with smaller pages"
        )
    if large:
        for path, longest_bytes in _longest_bytes(stream, group, sorted(large)).items():
            if longest_bytes > _SMALL_DICTIONARY_BYTES:
                kept.add(path)
            else:
                shared_bytes += longest_bytes
    row_bytes = stated.total_byte_size // max(1, stated.num_rows)
    most = min(_BATCH_BYTES // max(1, row_bytes), _SHARED_BYTES // max(1, shared_bytes))
    return max(1, min(_BATCH_ROWS, most)), frozenset(kept)


def _longest_bytes(stream: io.BufferedReader, group: int, columns: list[str]) -> dict[str, int]:
    """Return the length of the longest value that rows of a group may share, by column."""
    import pyarrow.compute as pc

    # A batch of one row holds all values of the dictionary.
    batches = _open(stream, columns).iter_batches(1, row_groups=[group], columns=columns)
    return {
        name: pc.max(pc.binary_length(batch.column(name).dictionary)).as_py() or 0
        for batch in islice(batches, 1)
        for name in batch.schema.names
    }


def _batch_rows(batch: Any, limit: int, unpacked_bytes: UnpackedBytes) -> Iterator[RawRow]:
    """Yield the rows of a batch; those above the limit are never made."""
    names, columns = batch.schema.names, batch.columns
    sizes = sum(map(_sizes, columns), np.zeros(batch.num_rows, np.int64))
    start = 0
    while start < len(sizes):
        if sizes[start] > limit:
            stated = {
                name: f"{_sizes(column.slice(start, 1))[0]:,} bytes"
                for name, column in zip(names, columns, strict=True)
            }
            yield RawRow(0, reason="row_too_large", text=repr(stated)[:EXCERPT_BYTES])
            start += 1
            continue
        held_bytes = np.cumsum(sizes[start:])
        fits = (held_bytes <= max(limit, _BATCH_BYTES)) & (sizes[start:] <= limit)
        stop = start + (len(fits) if fits.all() else int(np.argmin(fits)))
        unpacked_bytes.add(int(held_bytes[stop - start - 1]))
        parts = [_python_values(column.slice(start, stop - start)) for column in columns]
        for index in range(stop - start):
            yield _row(dict(zip(names, (part[index] for part in parts), strict=True)))
        start = stop


def _sizes(array: Any) -> NDArray[np.int64]:
    """Return the bytes that each value of an Arrow array takes in Python, about."""
    import pyarrow as pa
    import pyarrow.compute as pc

    is_type, kind = pa.types, array.type
    sizes = np.full(len(array), _VALUE_BYTES, np.int64)
    if isinstance(array, pa.ExtensionArray):
        return _sizes(array.storage)
    if is_type.is_dictionary(kind):
        if not len(array.dictionary):
            return sizes
        return _sizes(array.dictionary)[_numbers(array.indices)]
    texts = (is_type.is_string, is_type.is_large_string, is_type.is_binary, is_type.is_large_binary)
    if any(is_text(kind) for is_text in texts):
        return sizes + _numbers(pc.binary_length(array))
    if is_type.is_struct(kind):
        fields = (array.field(number) for number in range(kind.num_fields))
        return sum(map(_sizes, fields), np.full(len(array), _NESTED_BYTES, np.int64))
    if is_type.is_fixed_size_list(kind):
        array = array.cast(pa.list_(kind.value_type))
    elif not (is_type.is_list(kind) or is_type.is_large_list(kind) or is_type.is_map(kind)):
        return sizes
    parts = (array.keys, array.items) if is_type.is_map(kind) else (array.values,)
    before = np.zeros(len(parts[0]) + 1, np.int64)
    np.cumsum(sum(map(_sizes, parts)), out=before[1:])
    ends = _numbers(array.offsets)
    return _NESTED_BYTES + before[ends[1:]] - before[ends[:-1]]


def _numbers(array: Any) -> NDArray[np.int64]:
    """Return whole numbers of an Arrow array, 0 where there are none."""
    import pyarrow.compute as pc

    numbers: NDArray[np.int64] = pc.fill_null(array, 0).to_numpy(zero_copy_only=False)
    return numbers.astype(np.int64)


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


def _row(values: dict[str, Any]) -> RawRow:
    reason = ""
    try:
        for name, value in values.items():
            if isinstance(value, bytes):
                values[name] = value.decode()
                if b"\0" in value:
                    reason = "nul"
            elif isinstance(value, _NotText):
                reason = "invalid_utf8"
    except UnicodeDecodeError:
        reason = "invalid_utf8"
    if not reason:
        return RawRow(0, values)
    heads = {
        name: value[:EXCERPT_BYTES] if isinstance(value, (str, bytes)) else str(type(value))
        for name, value in values.items()
    }
    return RawRow(0, reason=reason, text=repr(heads)[:EXCERPT_BYTES])
