"""Raw rows of a file by the format and the compression that its name ends in.

Memory does not depend on the size of the file, compressed or not, and time and what comes out of a
compressed file are bounded (`budget`). A file that breaks off, or whose
checksum is wrong, ends in `UnreadableFileError`, after the rows before have been given (less at
most `STEP_BYTES` of a compressed file).
"""

from __future__ import annotations

import io
import shlex
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qwen3ft.data.readers.budget import UnpackedBytes, bounded
from qwen3ft.data.readers.csv import DELIMITERS, read_csv
from qwen3ft.data.readers.json_array import ArrayReader
from qwen3ft.data.readers.json_lines import read_json_rows
from qwen3ft.data.readers.parquet import ChooseColumns, read_parquet
from qwen3ft.data.readers.raw import MAX_ROW_BYTES, RawRow, UnreadableFileError

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
    *(text + codec for codec in _CODECS for text in _TEXT_SUFFIXES),
)
"""Ends of the names of files that can be read, in lower case."""

_BYTE_ORDER_MARK = b"\xef\xbb\xbf"
# UTF-32 first: its little-endian mark begins with that of UTF-16.
_OTHER_MARKS = {
    b"\xff\xfe\0\0": "UTF-32",
    b"\0\0\xfe\xff": "UTF-32",
    b"\xff\xfe": "UTF-16",
    b"\xfe\xff": "UTF-16",
}


def suffix_of(name: str) -> str:
    """Return the one of `SUFFIXES` that a file's name ends in; '' if it ends in none."""
    lower = name.lower()
    return next((suffix for suffix in SUFFIXES if lower.endswith(suffix)), "")


def is_readable(path: Path) -> bool:
    """Return whether there is a reader for files of this name."""
    return bool(suffix_of(path.name))


def read_raw(path: Path, choose: ChooseColumns, limit: int = MAX_ROW_BYTES) -> Iterator[RawRow]:
    """Yield every row of `path`, in order.

    Args:
        path: A file whose name ends in one of `SUFFIXES`.
        choose: Which columns of a parquet file to read; other formats give all of theirs.
        limit: Size of the largest row, in bytes.

    Raises:
        UnreadableFileError: the file breaks off here; rows before it have been given.
        OSError: it cannot be opened or read.
    """
    is_packed = path.suffix.lower() in (*_CODECS, ".parquet")
    return bounded(_rows(path, choose, limit), path, is_packed=is_packed)


def _rows(path: Path, choose: ChooseColumns, limit: int) -> Iterator[RawRow]:
    kind = suffix_of(path.name).split(".")[1]
    if kind == "parquet":
        yield from read_parquet(path, choose, limit)
    elif kind == "json":
        yield from _read_json(path, limit)
    else:
        with open_text_bytes(path) as (stream, offset):
            if kind == "jsonl":
                yield from read_json_rows(stream, offset, limit)
            else:
                delimiters = ("\t",) if kind == "tsv" else DELIMITERS
                yield from read_csv(stream, offset, limit, delimiters)


def _read_json(path: Path, limit: int) -> Iterator[RawRow]:
    """Yield rows of an array, of one object a line, a list inside an object, or of objects."""
    if _is_lines(path, limit):
        with open_text_bytes(path) as (stream, offset):
            yield from read_json_rows(stream, offset, limit)
        return
    is_packed = path.suffix.lower() in _CODECS
    source = f"<({_shown_by(path)})" if is_packed else shlex.quote(str(path))
    jq = f"jq -c '{{}}[]' {source} > {shlex.quote(_unpacked_name(path) + 'l')}"
    with open_text_bytes(path) as (stream, offset):
        reader = ArrayReader(stream, offset, limit, jq)
        if reader.enter():
            yield from reader.rows()
            return
    with open_text_bytes(path) as (stream, offset):
        yield from ArrayReader(stream, offset, limit, jq).rows()


def _is_lines(path: Path, limit: int) -> bool:
    """Return whether a .json file holds one object a line: one of its first two lines is an object.

    A single line, whole or not, may also be an object around a list, and is read as that.
    """
    with open_text_bytes(path) as (stream, _), suppress(UnreadableFileError):
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
def open_text_bytes(path: Path) -> Iterator[tuple[io.BufferedReader[Any], int]]:
    """Open the decompressed bytes of `path` behind a UTF-8 mark; yield them and their offset.

    Raises:
        UnreadableFileError: the byte order mark is that of UTF-16 or UTF-32; when reading: the file
            breaks off.
        OSError: it cannot be opened or read.
    """
    with _open_bytes(path) as stream:
        head = stream.peek(4)[:4]
        for mark, encoding in _OTHER_MARKS.items():
            if head.startswith(mark):
                raise UnreadableFileError(_other_encoding(path, encoding))
        yield stream, len(stream.read(3)) if head.startswith(_BYTE_ORDER_MARK) else 0


@contextmanager
def _open_bytes(path: Path) -> Iterator[io.BufferedReader[Any]]:
    codec = _CODECS.get(path.suffix.lower())
    if codec is None:
        with io.BufferedReader(io.FileIO(path), _BUFFER_BYTES) as stream:
            yield stream
        return
    import pyarrow as pa

    unpacked_bytes = UnpackedBytes(path.stat().st_size)
    with path.open("rb") as packed, pa.CompressedInputStream(packed, codec) as unpacked:
        yield io.BufferedReader(_Unpacked(unpacked, unpacked_bytes), STEP_BYTES)


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


def _other_encoding(path: Path, encoding: str) -> str:
    """Say why the file is not read, and how to convert it."""
    return (
        f"it is {encoding}, not UTF-8; convert it: {_shown_by(path)} | "
        f"iconv -f {encoding} -t UTF-8 > {shlex.quote('utf8-' + _unpacked_name(path))}"
    )


def _shown_by(path: Path) -> str:
    """Return the command that writes the decompressed file."""
    return f"{_UNPACK.get(path.suffix.lower(), 'cat')} {shlex.quote(str(path))}"


def _unpacked_name(path: Path) -> str:
    return path.stem if path.suffix.lower() in _CODECS else path.name
