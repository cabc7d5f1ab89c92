"""Files as streams of bytes, decompressed on the way: .gz and .zst, else as they are.

Guarantees: memory does not depend on the size of the content, so that a file that unpacks to
terabytes costs time alone; several members or frames one after the other are read as one; content
that breaks off or whose checksum is wrong ends in `UnreadableFileError`, after what came before it
(less at most `STEP_BYTES`) has been given.
Both are read with Arrow's decompressors, for Python has no zstd before 3.14.
"""

from __future__ import annotations

import io
import shlex
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qwen3ft.data.readers.csv import read_csv
from qwen3ft.data.readers.json_lines import JsonParser, RejectedValueError, read_json_lines
from qwen3ft.data.readers.json_stream import ElementReader
from qwen3ft.data.readers.parquet import ChooseColumns, read_parquet
from qwen3ft.data.readers.raw import EXCERPT_BYTES, RawRow, UnreadableFileError
from qwen3ft.units import MIB

if TYPE_CHECKING:
    from _typeshed import WriteableBuffer

STEP_BYTES = 64 * 2**10
"""How much is decompressed at once."""
BUFFER_BYTES = 256 * 2**10
CODECS = {".gz": "gzip", ".zst": "zstd"}
"""Name of Arrow's decompressor by the end of a file's name."""
BYTE_ORDER_MARK = b"\xef\xbb\xbf"
_OTHER_MARKS = {
    b"\xff\xfe\0\0": "UTF-32",
    b"\0\0\xfe\xff": "UTF-32",
    b"\xff\xfe": "UTF-16",
    b"\xfe\xff": "UTF-16",
}


@contextmanager
def open_text_bytes(path: Path) -> Iterator[tuple[io.BufferedReader[Any], int]]:
    """The decompressed bytes of `path`, and the offset they start at: behind a UTF-8 mark.

    Raises:
        UnreadableFileError: its byte order mark is that of UTF-16 or UTF-32; later, when reading:
            it breaks off.
        OSError: it cannot be opened or read.
    """
    with _open_bytes(path) as stream:
        head = stream.peek(4)[:4]
        for mark, encoding in _OTHER_MARKS.items():
            if head.startswith(mark):
                raise UnreadableFileError(_other_encoding(path, encoding))
        yield stream, len(stream.read(3)) if head.startswith(BYTE_ORDER_MARK) else 0


@contextmanager
def _open_bytes(path: Path) -> Iterator[io.BufferedReader[Any]]:
    codec = CODECS.get(path.suffix.lower())
    if codec is None:
        with io.BufferedReader(io.FileIO(path), BUFFER_BYTES) as stream:
            yield stream
        return
    import pyarrow as pa

    with path.open("rb") as packed, pa.CompressedInputStream(packed, codec) as unpacked:
        yield io.BufferedReader(_Unpacked(unpacked), STEP_BYTES)


class _Unpacked(io.RawIOBase):
    """Arrow's stream as one of Python's."""

    def __init__(self, stream: Any) -> None:
        super().__init__()
        self._stream = stream

    def readable(self) -> bool:
        """It is."""
        return True

    def readinto(self, buffer: WriteableBuffer) -> int:
        """Fill at most `STEP_BYTES` of `buffer`; 0 at the end."""
        view = memoryview(buffer).cast("B")
        try:
            data: bytes = self._stream.read(min(len(view), STEP_BYTES))
        except OSError as error:
            if error.errno is not None:  # the disk's, not the decompressor's
                raise
            raise UnreadableFileError(f"{error}; the file is cut short or damaged") from error
        view[: len(data)] = data
        return len(data)


def _other_encoding(path: Path, encoding: str) -> str:
    """Why the file is not read, and how to convert it."""
    suffix = path.suffix.lower()
    name = path.name.removesuffix(path.suffix) if suffix in CODECS else path.name
    unpack = {".gz": "gzip -dc", ".zst": "zstd -dc"}.get(suffix, "cat")
    return (
        f"it is {encoding}, not UTF-8; convert it: {unpack} {shlex.quote(str(path))} | "
        f"iconv -f {encoding} -t UTF-8 > {shlex.quote('utf8-' + name)}"
    )


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

MAX_ROW_BYTES = 16 * MIB

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
