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

from qwen3ft.data.readers.raw import UnreadableFileError

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
