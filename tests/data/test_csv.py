"""Records of csv, read many at once, are those of a reader that goes line by line."""

from __future__ import annotations

import io

import pytest
from hypothesis import given
from hypothesis import strategies as st
from support.csv_by_line import read_by_line

from qwen3ft.data.readers import csv as reader
from qwen3ft.data.readers.raw import EXCERPT_BYTES

PIECES = [
    *(b"a", b"b,c", b",", b"x,y\n", b"x,y\n", b"x,y\n", b'"', b'"', b'""', b"\n", b"\r\n", b"\r"),
    b"\r" * 20,
    *(b"\0", b"\xff", "你".encode(), b"long" * 30, b'"q\nr",s\n', b'"q, ""z""",s\n', b"x,y,z\n"),
    *(b"\x0b\x85", "\u2028".encode(), b"\n\n\n", b'"open,1\n', b";", b"\t"),
]


class SmallPieces(io.RawIOBase):
    """Stream that gives few bytes at a time."""

    def __init__(self, content: bytes, most: int) -> None:
        super().__init__()
        self._content, self._most = io.BytesIO(content), most

    def readable(self) -> bool:
        """It is."""
        return True

    def readinto(self, buffer: memoryview) -> int:  # type: ignore[override]
        """Fill a part of `buffer`."""
        data = self._content.read(min(self._most, len(buffer)))
        buffer[: len(data)] = data
        return len(data)


def test_of_returns_alone_no_more_is_held_than_a_row_may_have() -> None:
    """The line is too large, and reading goes on behind it."""
    content = b"q,a\n" + b"\r" * 100_000 + b"\nx,y\n"
    stream = io.BufferedReader(SmallPieces(content, 64), 64)
    rows = reader.read_csv(stream, 0, 1_000, ",")
    large = next(rows)
    assert (large.reason, large.line, large.offset) == ("row_too_large", 2, 4)
    assert len(content) - len(stream.read()) < 2_000
    stream = io.BufferedReader(SmallPieces(content, 64), 64)
    assert [row.values for row in reader.read_csv(stream, 0, 1_000, ",")][1:] == [
        {"q": "x", "a": "y"}
    ]


@pytest.mark.parametrize("most", [3, 64, 4096])
def test_a_line_of_returns_is_too_large_in_whatever_pieces_it_comes(most: int) -> None:
    """A blank line behind it changes nothing, and one that is just as long as allowed is blank."""
    content = b"q,a\n" + b"\r" * 15 + b"\n" + b"\r" * 16 + b"\n\r\nx,y\n"
    stream = io.BufferedReader(SmallPieces(content, most), 16)
    rows = [(row.line, row.reason) for row in reader.read_csv(stream, 0, 16, ",")]
    assert rows == [(3, "row_too_large"), (5, "")]


@given(
    pieces=st.lists(st.sampled_from(PIECES), max_size=60),
    limit=st.sampled_from([16, 40, 200, 2**20]),
    block_bytes=st.sampled_from([20, 64, reader._BLOCK_BYTES]),
    look_bytes=st.sampled_from([4, 30, reader._FIRST_LOOK_BYTES]),
    reach_bytes=st.sampled_from([8, 1024]),
    most=st.sampled_from([3, 64, 4096]),
)
def test_rows_are_those_of_a_reader_by_line(
    pieces: list[bytes],
    limit: int,
    block_bytes: int,
    look_bytes: int,
    reach_bytes: int,
    most: int,
) -> None:
    """Values, lines, bytes and reasons, with quotes that are never closed, NULs and long lines."""
    sizes = (reader._BLOCK_BYTES, reader._FIRST_LOOK_BYTES, reader._LEAST_REACH_BYTES)
    content = b"q,a\n" + b"".join(pieces)
    stream = io.BufferedReader(SmallPieces(content, most), 16)
    reader._BLOCK_BYTES, reader._FIRST_LOOK_BYTES = block_bytes, look_bytes
    reader._LEAST_REACH_BYTES = reach_bytes
    try:
        rows = list(reader.read_csv(stream, 0, limit, ","))
    finally:
        reader._BLOCK_BYTES, reader._FIRST_LOOK_BYTES, reader._LEAST_REACH_BYTES = sizes
    expected = read_by_line(content, limit, reach_bytes)
    assert [(row.line, row.offset, row.reason, list(row.values.values())) for row in rows] == [
        (row.line, row.offset, row.reason, row.values) for row in expected
    ]
    assert [row.text for row in rows] == [
        row.text[:EXCERPT_BYTES].decode("utf-8", "replace") for row in expected
    ]
