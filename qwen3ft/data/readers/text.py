"""Bytes of a text file as UTF-8, whatever its encoding, with the way back to its own bytes.

A UTF-8 file goes through as it is. Of others, what cannot be decoded becomes bytes that are no
UTF-8, so that it costs the rows that it is in. Memory is bounded by the sample, and by what the
reader has read ahead.
"""

from __future__ import annotations

import io
import re
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from itertools import chain
from typing import TYPE_CHECKING, NamedTuple

from qwen3ft.data.readers.encodings import (
    FLAW,
    NAMES,
    SAMPLE_BYTES,
    UTF8,
    broken_lines,
    decoder_of,
    likely_encoding,
    marked_encoding,
    recognise,
    unmarked_utf16,
)
from qwen3ft.data.readers.raw import MAX_ROW_BYTES, RawRow, UnreadableFileError

if TYPE_CHECKING:
    from _typeshed import WriteableBuffer

_INVALID_UTF8 = "invalid_utf8"
_MOST_AHEAD_BYTES = 2 * MAX_ROW_BYTES
# Three of its hanzi in a row are no text in any other encoding. They are found by the kinds of
# bytes: first ones, following ones, others.
_UTF8_RUN = re.compile(b"100100100(?:100)*")
_KINDS = bytes(
    ord("0" if byte in range(0x80, 0xC0) else "1" if byte in (*range(0xE3, 0xEA), 0xEF) else "x")
    for byte in range(256)
)
# Python's Shift-JIS gives these for bytes that are nothing.
_NOTHING = dict.fromkeys(range(0xF8F0, 0xF8F4), FLAW)


class _Piece(NamedTuple):
    """Converted text, and the number of bytes that it was."""

    utf8: bytes | None
    size: int
    own_size: int


@dataclass
class Conversion:
    """Facts about a file while it is read, for those that take its rows."""

    note: Callable[[str], None]
    """Receives a sentence, where that is not plain; it may be the same one again."""
    text: TextFile | None = None
    """The stream that the rows are from, once it is not UTF-8; it gives them their places."""


class TextFile(io.RawIOBase):
    """Stream of a file's bytes as UTF-8, without its byte order mark.

    Args:
        source: The bytes of the file, decompressed.
        chunk_bytes: How many to read at once.
        command: Function from an encoding to the command that converts the file.
        conversion: Receives how the file is read.
    """

    def __init__(
        self,
        source: io.RawIOBase,
        chunk_bytes: int,
        command: Callable[[str], str],
        conversion: Conversion,
    ) -> None:
        super().__init__()
        self._source, self._chunk_bytes, self._command = source, chunk_bytes, command
        self._conversion, self._codec, self._is_direct = conversion, UTF8, False
        self._pieces, self._ready = self._read(), memoryview(b"")
        self.start_bytes = 0
        """Size of the mark, which is known once something was read."""
        # What was converted, from the piece on that the last placed row starts in.
        self._ahead, self._ahead_bytes = deque[_Piece](), 0
        # Where that piece starts as UTF-8, and in the file; how much of it is before the row.
        self._offset = self._own_offset = self._passed = self._own_passed = 0

    def readable(self) -> bool:
        """It is."""
        return True

    def readinto(self, buffer: WriteableBuffer) -> int:
        """Fill a part of `buffer`; 0 at the end."""
        view = memoryview(buffer).cast("B")
        if self._is_direct and not self._ready:
            return self._source.readinto(view) or 0
        piece = self._ready or memoryview(next(self._pieces, b""))
        size = min(len(piece), len(view))
        view[:size] = piece[:size]
        self._ready = piece[size:]
        return size

    def place(self, row: RawRow) -> None:
        """Give a row of this stream its offset in the file, and a reason by its encoding."""
        row.offset = self._place(row.offset)
        if row.reason == _INVALID_UTF8:
            row.reason = f"invalid_{NAMES[self._codec].lower().replace('-', '_')}"

    def _read(self) -> Iterator[bytes | bytearray]:
        """Yield the file as UTF-8, up to where it is known to be."""
        chunks = iter(lambda: self._source.read(self._chunk_bytes) or b"", b"")
        data = next(chunks, b"")
        codec, self.start_bytes = marked_encoding(data)
        data, start = data[self.start_bytes :], self.start_bytes
        codec = codec or unmarked_utf16(data)
        failure = None
        if not codec:
            # Into the same memory: to make each piece anew would take longer than to look at it.
            held = bytearray(self._chunk_bytes)
            while data and data.isascii():  # the same as UTF-8 and as any other encoding
                yield data
                start += len(data)
                size = self._source.readinto(held) or 0
                is_full = size == len(held) and held.isascii()
                data = held if is_full else bytes(held[:size])
            data, failure = _sample(bytes(data), chunks)
            codec = self._decide(data)
        self._codec = codec
        if codec == UTF8:
            self._is_direct = failure is None
            yield data
        else:
            self._conversion.note(f"read as {NAMES[codec]}")
            self._conversion.text = self
            self._offset = self._own_offset = start
            yield from self._converted(chain([data], () if failure else chunks))
        if failure:
            raise failure

    def _decide(self, sample: bytes) -> str:
        """Return the codec of the file.

        Raises:
            UnreadableFileError: it is not UTF-8, and cannot be told.
        """
        if codec := recognise(sample):
            return codec
        lines, are_most = broken_lines(sample)
        command = self._command(likely_encoding(lines))
        if are_most:
            raise UnreadableFileError(
                f"it is not UTF-8, and its encoding cannot be told for sure; convert it: {command}"
            )
        self._conversion.note(
            f"read as UTF-8, which not all of it is; if it is another encoding: {command}"
        )
        return UTF8

    def _converted(self, chunks: Iterable[bytes]) -> Iterator[bytes]:
        decoder, held, has_lines = decoder_of(self._codec), b"", not self._codec.startswith("utf")
        for chunk in chain(chunks, [b""]):
            block = held + chunk
            cut = len(block)
            if chunk and has_lines:  # in these encodings no other character has a newline's byte
                cut = block.rfind(b"\n") + 1 or (cut if cut > SAMPLE_BYTES else 0)
            block, held = block[:cut], block[cut:]
            before, text, at = len(decoder.getstate()[0]), "", 0
            # A few lines of UTF-8 among others would be read as something else.
            for run in _UTF8_RUN.finditer(block.translate(_KINDS)) if has_lines else ():
                text += decoder.decode(block[at : run.start()], True) + FLAW * len(run[0])
                at = run.end()
            text += decoder.decode(block[at:], not chunk)
            if self._codec == "cp932":
                text = text.translate(_NOTHING)
            utf8 = text.encode("utf-8", "surrogateescape")
            own_size = before + len(block) - len(decoder.getstate()[0])
            self._remember(_Piece(utf8, len(utf8), own_size))
            if utf8:  # nothing would be the end of the file
                yield utf8

    def _remember(self, piece: _Piece) -> None:
        if self._ahead and self._ahead_bytes > _MOST_AHEAD_BYTES:
            # The middle of a row that is too large, or blank: no row starts in there.
            last = self._ahead[-1]
            self._ahead[-1] = last._replace(utf8=None)
            self._ahead_bytes -= last.size
        self._ahead.append(piece)
        self._ahead_bytes += piece.size

    def _place(self, offset: int) -> int:
        """Return the file's own byte for that of the stream; offsets must not fall."""
        while self._ahead and self._offset + self._ahead[0].size <= offset:
            piece = self._ahead.popleft()
            self._offset += piece.size
            self._own_offset += piece.own_size
            self._ahead_bytes -= piece.size if piece.utf8 is not None else 0
            self._passed = self._own_passed = 0
        passed = offset - self._offset
        if passed < 0:  # in the ASCII before
            return offset
        if self._ahead and (utf8 := self._ahead[0].utf8) is not None and passed > self._passed:
            text = utf8[self._passed : passed].decode("utf-8", "surrogateescape")
            flaws = text.count(FLAW)
            text = text.replace(FLAW, "") if flaws else text
            self._own_passed += flaws + len(text.encode(self._codec))
            self._passed = passed
        return self._own_offset + self._own_passed


def _sample(data: bytes, chunks: Iterator[bytes]) -> tuple[bytes, UnreadableFileError | None]:
    """Return `data` with what follows, `SAMPLE_BYTES` in all, and the error that ended it."""
    pieces, size = [data], len(data)
    try:
        while size < SAMPLE_BYTES and (chunk := next(chunks, b"")):
            pieces.append(chunk)
            size += len(chunk)
    except UnreadableFileError as error:  # what comes before the damage is read all the same
        return b"".join(pieces), error
    return b"".join(pieces), None
