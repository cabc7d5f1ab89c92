"""Plain twin of the csv reader: one line at a time, one record at a time."""

from __future__ import annotations

import csv
from typing import NamedTuple


class Row(NamedTuple):
    """A row as the reader gives it."""

    line: int
    offset: int
    reason: str
    values: list[str]
    text: bytes
    """Lines of a bad row."""


def read_by_line(content: bytes, limit: int, least_reach: int) -> list[Row]:
    """Return the rows of a comma-separated file behind its line of names, which is plain."""
    lines, offset = [], 0
    for line in _split(content):
        lines.append((len(lines) + 1, offset, line))
        offset += len(line)
    names = lines[0][2].decode().rstrip("\r\n").split(",")
    rows, at, reach = [], 1, limit
    while at < len(lines):
        record, flaw, is_cut, values = [], "", False, None
        text: list[str] = []
        while values is None:
            if sum(len(line) for _, _, line in record) >= reach or at + len(record) == len(lines):
                is_cut = True
                break
            record.append(lines[at + len(record)])
            flaw = _flaw(record[-1][2], limit)
            if flaw:
                break
            text.append(record[-1][2].decode("utf-8", "surrogateescape"))
            try:
                values = next(csv.reader(text, strict=True))
            except csv.Error as error:
                if "unexpected end" not in str(error):
                    break
        if not record:
            break
        kept, reason = len(record), ""
        if values is None or (len(values) != len(names) and _hides_rows(record, len(names))):
            first_flaw = _flaw(record[0][2], limit)
            kept, reason = 1, first_flaw or "broken_csv"
        elif len(values) != len(names):
            reason = "wrong_column_count" if values else "blank"
        elif not all(_is_utf8(line) for _, _, line in record):
            reason = "invalid_utf8"
        number, start, _ = record[0]
        whole = b"".join(line[:limit] for _, _, line in record[:kept])
        if reason:
            rows.append(Row(number, start, reason, [], whole))
        else:
            rows.append(Row(number, start, "", values or [], b""))
        if kept == len(record) > 1:
            reach = min(limit, 2 * reach)
        elif is_cut:
            reach = max(min(least_reach, limit), reach // 2)
        at += kept
    return [row for row in rows if row.reason != "blank"]


def _split(content: bytes) -> list[bytes]:
    pieces = content.split(b"\n")
    return [piece + b"\n" for piece in pieces[:-1]] + ([pieces[-1]] if pieces[-1] else [])


def _flaw(line: bytes, limit: int) -> str:
    if len(line) > limit or (len(line) == limit and not line.endswith(b"\n")):
        return "row_too_large"
    return "nul" if b"\0" in line else ""


def _is_utf8(line: bytes) -> bool:
    try:
        line.decode()
    except UnicodeDecodeError:
        return False
    return True


def _hides_rows(record: list[tuple[int, int, bytes]], columns: int) -> bool:
    inside = [line.decode("utf-8", "replace") for _, _, line in record[1:-1]]
    try:
        rows = list(csv.reader(inside, strict=True))
    except csv.Error:
        return False
    return bool(rows) and all(len(row) == columns for row in rows)
