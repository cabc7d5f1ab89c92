"""From a file's bytes to raw rows: JSON lines, JSON arrays, csv and parquet, one row at a time.

Guarantees: every row comes out once, with its place, and either its values or a reason code; what
is wrong with one row costs that row alone. Lines, csv and parquet are streamed, and a line of more
than `MAX_ROW_BYTES` is never held. What the values mean is `rows`' business.
It does not cover: arrays larger than memory (they are read whole); encodings other than UTF-8; csv
dialects other than the comma's. It imports neither torch nor transformers.
"""

from __future__ import annotations

import csv
import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

MAX_ROW_BYTES = 16 * 2**20
EXCERPT_BYTES = 1024
"""How much of a bad row is kept, before it is masked and cut for the quarantine."""
PARQUET_BATCH_ROWS = 1024
BYTE_ORDER_MARK = b"\xef\xbb\xbf"

ChooseColumns = Callable[[tuple[str, ...]], list[str]]
"""Given the columns of a parquet file, which of them to read."""


@dataclass(slots=True)
class RawRow:
    """What stands at one place: values by name, or the reason code why there are none."""

    line: int
    """1-based: the line of a file of lines, else the row."""
    values: dict[str, Any] = field(default_factory=dict)
    reason: str = ""
    text: str = ""
    """The beginning of a bad row."""


class UnreadableFileError(Exception):
    """The file as a whole, or the rest of it, cannot be read."""


class _RejectedError(ValueError):
    """A value cannot be used; the message is the reason code."""


def read_raw(path: Path, choose: ChooseColumns) -> Iterator[RawRow]:
    """Every row of `path`, in order, by the format that its name ends in.

    Raises:
        UnreadableFileError: the file breaks off here; rows before it have been given.
        OSError: it cannot be opened or read.
    """
    if path.suffix.lower() == ".parquet":
        return _read_parquet(path, choose)
    readers = {".jsonl": _read_json_lines, ".json": _read_json, ".csv": _read_csv}
    return readers[path.suffix.lower()](path)


def _read_json_lines(path: Path) -> Iterator[RawRow]:
    with path.open("rb") as stream:
        number = 0
        while line := stream.readline(MAX_ROW_BYTES):
            number += 1
            if len(line) == MAX_ROW_BYTES and not line.endswith(b"\n"):
                while (rest := stream.readline(MAX_ROW_BYTES)) and not rest.endswith(b"\n"):
                    pass
                yield _bad(number, "row_too_large", line)
            elif line.removeprefix(BYTE_ORDER_MARK).strip():
                yield _parse_line(number, line.removeprefix(BYTE_ORDER_MARK))


def _bad(number: int, reason: str, line: bytes) -> RawRow:
    return RawRow(number, reason=reason, text=line[:EXCERPT_BYTES].decode("utf-8", "replace"))


def _parse_line(number: int, line: bytes) -> RawRow:
    try:
        if b"\0" in line:
            raise _RejectedError("nul")
        value = json.loads(line.decode("utf-8"), parse_constant=_reject_constant)
    except UnicodeDecodeError:
        return _bad(number, "invalid_utf8", line)
    except _RejectedError as error:
        return _bad(number, str(error), line)
    except (ValueError, RecursionError):
        return _bad(number, "broken_json", line)
    if not isinstance(value, dict):
        return _bad(number, "not_an_object", line)
    return RawRow(number, values=value)


def _reject_constant(_name: str) -> None:
    raise _RejectedError("nan_literal")


def _read_json(path: Path) -> Iterator[RawRow]:
    """An array of objects, or one object a line."""
    with path.open("rb") as stream:
        start = stream.read(4096).removeprefix(BYTE_ORDER_MARK).lstrip()
    if not start.startswith(b"["):
        yield from _read_json_lines(path)
        return
    try:
        items = json.loads(path.read_bytes().decode("utf-8-sig"))
    except (ValueError, RecursionError) as error:
        raise UnreadableFileError(f"{type(error).__name__}: {error}") from error
    for number, item in enumerate(items, 1):
        yield _array_row(number, item)


def _array_row(number: int, item: Any) -> RawRow:
    reason = "" if isinstance(item, dict) else "not_an_object"
    try:
        json.dumps(item, allow_nan=False)
    except ValueError:
        reason = "nan_literal"
    if reason:
        return RawRow(
            number, reason=reason, text=json.dumps(item, ensure_ascii=False)[:EXCERPT_BYTES]
        )
    return RawRow(number, values=item)


def _read_csv(path: Path) -> Iterator[RawRow]:
    csv.field_size_limit(MAX_ROW_BYTES)
    # Bytes that are no UTF-8 come out as lone surrogates, so that they cost one row, not the file.
    with path.open(encoding="utf-8-sig", errors="surrogateescape", newline="") as stream:
        rows = csv.reader(stream, strict=True)
        try:
            names = next(rows, [])
        except csv.Error as error:
            raise UnreadableFileError(f"the line of column names: {error}") from error
        for number, values in enumerate(_csv_values(rows), 1):
            yield _csv_row(number, names, values)


def _csv_values(rows: Iterator[list[str]]) -> Iterator[list[str] | csv.Error]:
    """The rows that are not blank; a broken one as its error, after which reading goes on."""
    while True:
        try:
            values = next(rows)
        except StopIteration:
            return
        except csv.Error as error:
            yield error
            continue
        if values:
            yield values


def _csv_row(number: int, names: list[str], values: list[str] | csv.Error) -> RawRow:
    if isinstance(values, csv.Error):
        return RawRow(number, reason="broken_csv", text=str(values))
    text = ",".join(value[:EXCERPT_BYTES] for value in values)
    if len(names) != len(values):
        return RawRow(number, reason="wrong_column_count", text=text)
    try:
        "".join(values).encode()
    except UnicodeEncodeError:
        return RawRow(number, reason="invalid_utf8", text=text)
    return RawRow(number, values=dict(zip(names, values, strict=True)))


def _read_parquet(path: Path, choose: ChooseColumns) -> Iterator[RawRow]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        with pq.ParquetFile(path) as table:
            columns = choose(tuple(table.schema_arrow.names))
            number = 0
            for batch in table.iter_batches(PARQUET_BATCH_ROWS, columns=columns):
                parts = {name: _arrow_values(batch.column(name)) for name in batch.schema.names}
                for index in range(batch.num_rows):
                    number += 1
                    yield _arrow_row(number, {name: parts[name][index] for name in parts})
    except pa.ArrowException as error:
        raise UnreadableFileError(f"{type(error).__name__}: {error}") from error


def _arrow_values(column: Any) -> list[Any]:
    """The column as Python values; text as bytes, for Arrow does not promise that it is UTF-8."""
    import pyarrow as pa

    if pa.types.is_dictionary(column.type):
        column = column.dictionary_decode()
    if pa.types.is_string(column.type) or pa.types.is_large_string(column.type):
        column = column.cast(pa.large_binary())
    values: list[Any] = column.to_pylist()
    return values


def _arrow_row(number: int, values: dict[str, Any]) -> RawRow:
    try:
        decoded = {
            name: value.decode("utf-8") if isinstance(value, bytes) else value
            for name, value in values.items()
        }
    except UnicodeDecodeError:
        return RawRow(number, reason="invalid_utf8", text=repr(values)[:EXCERPT_BYTES])
    return RawRow(number, values=decoded)
