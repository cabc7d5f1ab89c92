"""From a file's name to its reader: raw rows of JSON lines, JSON, csv, tsv and parquet, one by one.

Guarantees: every row comes out once, with its place, and either its values or a reason code; what
is wrong with one row costs that row alone; files are streamed, and a row of more than
`MAX_ROW_BYTES` is never held. The same rows are the same in every format. What the values mean is
`rows`' business. Each reader's module says what it does not cover; all but parquet must be UTF-8,
and may be compressed (.gz, .zst).
It imports neither torch nor transformers.
"""

from __future__ import annotations

import io
from collections.abc import Iterator
from pathlib import Path

from qwen3ft.data.readers.csv import read_csv
from qwen3ft.data.readers.json_lines import JsonParser, RejectedValueError, read_json_lines
from qwen3ft.data.readers.json_stream import ElementReader
from qwen3ft.data.readers.open import CODECS, open_text_bytes
from qwen3ft.data.readers.parquet import ChooseColumns, read_parquet
from qwen3ft.data.readers.raw import EXCERPT_BYTES, RawRow, UnreadableFileError

__all__ = [
    "EXCERPT_BYTES",
    "MAX_ROW_BYTES",
    "SUFFIXES",
    "ChooseColumns",
    "RawRow",
    "UnreadableFileError",
    "is_readable",
    "read_raw",
    "suffix_of",
]

MAX_ROW_BYTES = 16 * 2**20
_TEXT_SUFFIXES = (".jsonl", ".json", ".csv", ".tsv")
SUFFIXES = (
    *_TEXT_SUFFIXES,
    ".parquet",
    *(text + codec for codec in CODECS for text in _TEXT_SUFFIXES),
)
"""Ends of the names of files that can be read, in lower case."""


def suffix_of(name: str) -> str:
    """The one of `SUFFIXES` that a file's name ends in; '' if it ends in none."""
    lower = name.lower()
    return next((suffix for suffix in SUFFIXES if lower.endswith(suffix)), "")


def is_readable(path: Path) -> bool:
    """Whether the name says that there is a reader for it."""
    return bool(suffix_of(path.name))


def read_raw(path: Path, choose: ChooseColumns) -> Iterator[RawRow]:
    """Every row of `path`, in order, by the format that its name ends in.

    Args:
        path: A file whose name ends in one of `SUFFIXES`.
        choose: Which columns of a parquet file to read; other formats give all of theirs.

    Raises:
        UnreadableFileError: the file breaks off here; rows before it have been given.
        OSError: it cannot be opened or read.
    """
    kind = suffix_of(path.name).split(".")[1]
    if kind == "parquet":
        yield from read_parquet(path, choose, MAX_ROW_BYTES)
    elif kind == "json":
        yield from _read_json(path)
    else:
        with open_text_bytes(path) as (stream, offset):
            if kind == "jsonl":
                yield from read_json_lines(stream, offset, MAX_ROW_BYTES)
            else:
                delimiter = "\t" if kind == "tsv" else None
                yield from read_csv(stream, offset, MAX_ROW_BYTES, delimiter)


def _read_json(path: Path) -> Iterator[RawRow]:
    """An array, one object a line, a list inside an object, or objects one after the other."""
    if _is_lines(path):
        with open_text_bytes(path) as (stream, offset):
            yield from read_json_lines(stream, offset, MAX_ROW_BYTES)
        return
    for enter in (ElementReader.enter_array, ElementReader.enter_list_field):
        with open_text_bytes(path) as (stream, offset):
            reader = ElementReader(stream, offset, MAX_ROW_BYTES)
            if enter(reader):
                yield from reader.elements(is_closed=True)
                return
    with open_text_bytes(path) as (stream, offset):
        yield from ElementReader(stream, offset, MAX_ROW_BYTES).elements(is_closed=False)


def _is_lines(path: Path) -> bool:
    """Whether a .json file holds one object a line: of its first two lines one is an object.

    A single line, whole or not, may also be an object around a list, and is read as that.
    """
    with open_text_bytes(path) as (stream, _):
        while (head := stream.peek(1)) and head.isspace():
            stream.read(len(head))
        if not head or not head.lstrip().startswith(b"{"):
            return not head.lstrip().startswith(b"[")
        try:
            first, second = _filled_line(stream), b""
            if len(first) < MAX_ROW_BYTES or first.endswith(b"\n"):
                second = _filled_line(stream)
        except UnreadableFileError:  # the file breaks off; what comes before is read all the same
            return False
    return bool(second) and any(map(_is_object_line, (first, second)))


def _is_object_line(line: bytes) -> bool:
    """Whether `line` is a JSON object, or one that is refused for what it holds."""
    try:
        JsonParser().parse_line(line)
    except RejectedValueError as error:
        is_part = line.rstrip().endswith((b"{", b"[", b","))
        return str(error) != "broken_json" and not is_part
    return True


def _filled_line(stream: io.BufferedReader) -> bytes:
    """The next line that is not blank; b'' at the end."""
    while (line := stream.readline(MAX_ROW_BYTES)) and line.isspace():
        pass
    return line
