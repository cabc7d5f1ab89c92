"""Raw rows of a file by the format and the compression that its name ends in.

Memory does not depend on the size of the file, compressed or not, and time and what comes out of a
compressed file are bounded (`budget`). A file that breaks off, or whose
checksum is wrong, ends in `UnreadableFileError`, after the rows before have been given (less at
most `STEP_BYTES` of a compressed file).
"""

from __future__ import annotations

import io
import shlex
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qwen3ft.data.readers.budget import UnpackedBytes, bounded
from qwen3ft.data.readers.csv import DELIMITERS, read_csv
from qwen3ft.data.readers.json_array import ArrayReader
from qwen3ft.data.readers.json_lines import read_json_rows
from qwen3ft.data.readers.parquet import ChooseColumns, read_parquet
from qwen3ft.data.readers.raw import MAX_ROW_BYTES, RawRow, UnreadableFileError
from qwen3ft.data.readers.sheets import SHEET_SUFFIXES, read_sheet
from qwen3ft.data.readers.text import Conversion, TextFile

if TYPE_CHECKING:
    from _typeshed import WriteableBuffer

# Small: what was decompressed together with damaged data is lost.
STEP_BYTES = 64 * 2**10
"""Most bytes decompressed at once."""
_BUFFER_BYTES = 256 * 2**10
# Python has no zstd before 3.14, so that both are read by Arrow.
_CODECS = {".gz": "gzip", ".zst": "zstd"}
_UNPACK = {".gz": "gzip -dc", ".zst": "zstd -dc"}
_TEXT_SUFFIXES = (".jsonl", ".json", ".csv", ".tsv")

SUFFIXES = (
    *_TEXT_SUFFIXES,
    ".parquet",
    *SHEET_SUFFIXES,
    *(text + codec for codec in _CODECS for text in _TEXT_SUFFIXES),
)
"""Ends of the names of files that can be read, in lower case."""


def suffix_of(name: str) -> str:
    """Return the one of `SUFFIXES` that a file's name ends in; '' if it ends in none."""
    lower = name.lower()
    return next((suffix for suffix in SUFFIXES if lower.endswith(suffix)), "")


def read_raw(
    path: Path,
    choose: ChooseColumns,
    limit: int = MAX_ROW_BYTES,
    note: Callable[[str], None] = lambda _: None,
) -> Iterator[RawRow]:
    """Yield every row of `path`, in order.

    Args:
        path: A file whose name ends in one of `SUFFIXES`.
        choose: Which columns of a parquet file to read; other formats give all of theirs.
        limit: Size of the largest row, in bytes.
        note: Receives how the file is read, where that is not plain; maybe more than once.

    Raises:
        UnreadableFileError: the file breaks off here; rows before it have been given.
        OSError: it cannot be opened or read.
    """
    is_packed = path.suffix.lower() in (*_CODECS, ".parquet", *SHEET_SUFFIXES)
    conversion = Conversion(note)
    rows = _rows(path, choose, limit, conversion)
    return bounded(rows, path, conversion, is_packed=is_packed)


def _rows(
    path: Path, choose: ChooseColumns, limit: int, conversion: Conversion
) -> Iterator[RawRow]:
    kind = suffix_of(path.name).split(".")[1]
    if kind == "parquet":
        yield from read_parquet(path, choose, limit)
    elif f".{kind}" in SHEET_SUFFIXES:
        yield from read_sheet(path, limit, conversion.note)
    elif kind == "json":
        yield from _read_json(path, limit, conversion)
    else:
        with open_text_bytes(path, conversion) as (stream, text):
            if kind == "jsonl":
                rows = read_json_rows(stream, text.start_bytes, limit)
            else:
                rows = read_csv(
                    stream, text.start_bytes, limit, ("\t",) if kind == "tsv" else DELIMITERS
                )
            yield from rows


def _read_json(path: Path, limit: int, conversion: Conversion) -> Iterator[RawRow]:
    """Yield rows of an array, of one object a line, a list inside an object, or of objects."""
    if _is_lines(path, limit, conversion):
        with open_text_bytes(path, conversion) as (stream, text):
            yield from read_json_rows(stream, text.start_bytes, limit)
        return
    is_packed = path.suffix.lower() in _CODECS
    source = f"<({_shown_by(path)})" if is_packed else shlex.quote(str(path))
    jq = f"jq -c '{{}}[]' {source} > {shlex.quote(_unpacked_name(path) + 'l')}"
    with open_text_bytes(path, conversion) as (stream, text):
        reader = ArrayReader(stream, text.start_bytes, limit, jq)
        if reader.enter():
            yield from reader.rows()
            return
    with open_text_bytes(path, conversion) as (stream, text):
        yield from ArrayReader(stream, text.start_bytes, limit, jq).rows()


def _is_lines(path: Path, limit: int, conversion: Conversion) -> bool:
    """Return whether a .json file holds one object a line: one of its first two lines is an object.

    A single line, whole or not, may also be an object around a list, and is read as that.
    """
    with open_text_bytes(path, conversion) as (stream, _), suppress(UnreadableFileError):
        while (head := stream.peek(1)) and head.isspace():
            stream.read(len(head))
        if not head.lstrip().startswith(b"{"):
            return not head.lstrip().startswith(b"[")
        first = _filled_line(stream, limit)
        is_whole = len(first) < limit or first.endswith(b"\n")
        second = _filled_line(stream, limit) if is_whole else b""
        lines = (first.strip(), second.strip()) if second else ()
        return any(line.startswith(b"{") and line.endswith(b"}") for line in lines)
    return False  # the file breaks off; what comes before is read all the same


def _filled_line(stream: io.BufferedReader, limit: int) -> bytes:
    """Return the next line that is not blank; b'' at the end."""
    while (line := stream.readline(limit)) and line.isspace():
        pass
    return line


@contextmanager
def open_text_bytes(
    path: Path, conversion: Conversion
) -> Iterator[tuple[io.BufferedReader[Any], TextFile]]:
    """Open the decompressed bytes of `path` as UTF-8; yield their buffer and the stream below.

    Raises:
        UnreadableFileError: its encoding cannot be told; when reading: the file breaks off.
        OSError: it cannot be opened or read.
    """

    def command(encoding: str) -> str:
        converted = shlex.quote("utf8-" + _unpacked_name(path))
        return f"{_shown_by(path)} | iconv -f {encoding} -t UTF-8 > {converted}"

    conversion.text = None
    with _open_bytes(path) as (source, chunk_bytes):
        text = TextFile(source, chunk_bytes, command, conversion)
        with io.BufferedReader(text, chunk_bytes) as stream:
            stream.peek(1)
            yield stream, text


@contextmanager
def _open_bytes(path: Path) -> Iterator[tuple[io.RawIOBase, int]]:
    """Yield the decompressed bytes, and how many to read at once."""
    codec = _CODECS.get(path.suffix.lower())
    if codec is None:
        with io.FileIO(path) as file:
            yield file, _BUFFER_BYTES
        return
    import pyarrow as pa

    unpacked_bytes = UnpackedBytes(path.stat().st_size)
    with path.open("rb") as packed, pa.CompressedInputStream(packed, codec) as unpacked:
        yield _Unpacked(unpacked, unpacked_bytes), STEP_BYTES


class _Unpacked(io.RawIOBase):
    """Arrow's stream as one of Python's."""

    def __init__(self, stream: Any, unpacked_bytes: UnpackedBytes) -> None:
        super().__init__()
        self._stream, self._unpacked_bytes = stream, unpacked_bytes

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
        self._unpacked_bytes.add(len(data))
        view[: len(data)] = data
        return len(data)


def _shown_by(path: Path) -> str:
    """Return the command that writes the decompressed file."""
    return f"{_UNPACK.get(path.suffix.lower(), 'cat')} {shlex.quote(str(path))}"


def _unpacked_name(path: Path) -> str:
    return path.stem if path.suffix.lower() in _CODECS else path.name
