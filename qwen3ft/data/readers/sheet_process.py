"""The process that reads one spreadsheet, and writes its rows to standard output as JSON lines.

A line is {"note": text}, {"error": text}, {"row": number, "values": [text, ...]}, {"row": number,
"too_large": text}, or at last {}.
"""

from __future__ import annotations

import html
import json
import re
import resource
import sys
import zipfile
from collections import Counter
from collections.abc import Iterator
from contextlib import suppress
from datetime import date, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any
from xml.etree import ElementTree as ET

if TYPE_CHECKING:
    from python_calamine import CalamineSheet, CalamineWorkbook

MOST_BYTES = 2**30
"""Most that a file may unpack to, and most memory of the process."""
MOST_SECONDS = 300
"""Most CPU time of the process."""

_CHUNK_BYTES, _LONGEST_TAG, _MOST_NAMES = 2**20, 4096, 8
_NOTES = {
    "hidden_rows": "hidden rows ({}) are read like the others",
    "hidden_columns": "hidden columns ({}) are read like the others",
    "no_result": "formulas without a stored result ({}) are empty; save the file in Excel",
    "error": "cells with an error such as #N/A ({}) are empty",
}
_XLSX = re.compile(
    rb"""<(?:\w+:)?row\b[^>]{0,2000}\bhidden="(?P<hidden_rows>1|true)"
    |<(?:\w+:)?col\b[^>]{0,2000}\bhidden="(?P<hidden_columns>1|true)"
    |<(?:\w+:)?c\b[^>]{0,2000}\bt="(?P<error>e)"
    |(?:</(?:\w+:)?f>|<(?:\w+:)?f\b[^>]{0,2000}/>)(?:<(?:\w+:)?v\s*/>|<(?:\w+:)?v></(?:\w+:)?v>)?
     (?P<no_result></(?:\w+:)?c>)""",
    re.VERBOSE,
)
_ODS = re.compile(
    rb"""<table:table\b[^>]{0,2000}?\btable:name="(?P<sheet>[^"]*)"
    |<table:table-row\b[^>]{0,2000}\btable:visibility="(?P<hidden_rows>collapse|filter)"
    |<table:table-column\b[^>]{0,2000}\btable:visibility="(?P<hidden_columns>collapse|filter)"
    |<table:table-cell\b[^>]{0,2000}\bcalcext:value-type="(?P<error>error)\"""",
    re.VERBOSE,
)


class _RefusedError(Exception):
    """The file is not read; the message says why."""


def write_sheet(path: Path, limit: int) -> None:
    """Write the rows of `path`; rows of more than `limit` characters are cut."""
    with suppress(ValueError, OSError):  # macOS does not bound memory
        resource.setrlimit(resource.RLIMIT_AS, (MOST_BYTES, MOST_BYTES))
    resource.setrlimit(resource.RLIMIT_CPU, (MOST_SECONDS, MOST_SECONDS))
    try:
        for entry in _entries(path, limit):
            sys.stdout.write(json.dumps(entry) + "\n")
    except BrokenPipeError:
        return
    except Exception as error:  # noqa: BLE001  # the library raises all kinds on a damaged file
        reason = str(error) if isinstance(error, _RefusedError) else f"it is damaged: {error!r}"
        sys.stdout.write(json.dumps({"error": reason}) + "\n")
    sys.stdout.flush()


def _entries(path: Path, limit: int) -> Iterator[dict[str, Any]]:
    from python_calamine import CalamineWorkbook

    if not zipfile.is_zipfile(path):
        raise _RefusedError("it is damaged, or protected by a password; save its sheet as csv")
    with zipfile.ZipFile(path) as archive:
        unpacked_bytes = sum(member.file_size for member in archive.infolist())
        if unpacked_bytes > MOST_BYTES:
            raise _RefusedError(
                f"it unpacks to {unpacked_bytes / 1e9:.1f} GB, and at most {MOST_BYTES / 1e9:.1f} "
                "GB are read; save its sheet as csv"
            )
        workbook = CalamineWorkbook.from_path(path)
        if sheet := _first_sheet(workbook):
            yield from ({"note": text} for text in _notes(archive, workbook, sheet))
            yield from _rows(sheet, limit)
    yield {}


def _first_sheet(workbook: CalamineWorkbook) -> CalamineSheet | None:
    """Return the first visible sheet that is not empty."""
    for about in workbook.sheets_metadata:
        if _kind(about.visible) == "visible" and _kind(about.typ) == "worksheet":
            sheet = workbook.get_sheet_by_name(about.name)
            if any(map(_is_filled, sheet.iter_rows())):
                return sheet
    return None


def _kind(value: object) -> str:
    return str(value).rpartition(".")[2].lower()


def _notes(
    archive: zipfile.ZipFile, workbook: CalamineWorkbook, sheet: CalamineSheet
) -> Iterator[str]:
    others = [
        repr(about.name) + ("" if _kind(about.visible) == "visible" else " (hidden)")
        for about in workbook.sheets_metadata
        if about.name != sheet.name
    ]
    more = f" and {len(others) - _MOST_NAMES} more" if len(others) > _MOST_NAMES else ""
    unread = f"; not read: {', '.join(others[:_MOST_NAMES])}{more}" if others else ""
    yield f"sheet {sheet.name!r}{unread}"
    if merged := len(sheet.merged_cell_ranges or ()):
        yield f"ranges of merged cells ({merged}): only the first cell of each has the text"
    for flaw, count in _flaws(archive, sheet.name).items():
        yield _NOTES[flaw].format(count)


def _flaws(archive: zipfile.ZipFile, sheet: str) -> Counter[str]:
    """Count what the library does not tell of a sheet, by the names of `_NOTES`."""
    is_ods = "content.xml" in archive.namelist()
    member, pattern = ("content.xml", _ODS) if is_ods else (_member(archive, sheet), _XLSX)
    found: Counter[str] = Counter()
    held, is_inside = b"", not is_ods
    with archive.open(member) as stream:
        while chunk := stream.read(_CHUNK_BYTES):
            held += chunk
            end = max(0, len(held) - _LONGEST_TAG) if len(chunk) == _CHUNK_BYTES else len(held)
            for match in pattern.finditer(held):
                if match.start() >= end:
                    break
                if match.lastgroup == "sheet":
                    is_inside = html.unescape(match[1].decode("utf-8", "replace")) == sheet
                elif is_inside:
                    found[str(match.lastgroup)] += 1
            held = held[end:]
    return found


def _member(archive: zipfile.ZipFile, sheet: str) -> str:
    """Return the file of a sheet inside of xlsx."""
    links = ET.fromstring(archive.read("xl/_rels/workbook.xml.rels"))  # noqa: S314
    targets = {link.get("Id"): link.get("Target", "") for link in links}
    for element in ET.fromstring(archive.read("xl/workbook.xml")).iter():  # noqa: S314
        if element.tag.endswith("}sheet") and element.get("name") == sheet:
            key = next(value for name, value in element.items() if name.endswith("}id"))
            target = targets[key]
            return target[1:] if target.startswith("/") else f"xl/{target}"
    raise KeyError(sheet)


def _rows(sheet: CalamineSheet, limit: int) -> Iterator[dict[str, Any]]:
    for number, cells in enumerate(sheet.iter_rows(), 1):
        if not _is_filled(cells):
            continue
        values = [_text(cell) for cell in cells]
        if sum(map(len, values)) > limit:
            yield {"row": number, "too_large": "".join(value[:limit] for value in values)[:limit]}
        else:
            yield {"row": number, "values": values}


def _is_filled(cells: list[Any]) -> bool:
    return any(cell != "" for cell in cells)


def _text(cell: Any) -> str:
    """Return a cell as its program shows it, without a format; dates by ISO 8601."""
    match cell:
        case str():
            return cell
        case bool():
            return "TRUE" if cell else "FALSE"
        case float():
            return str(int(cell)) if cell.is_integer() and abs(cell) < 1e15 else f"{cell:.15g}"
        case datetime():
            return cell.isoformat(" ")
        case date():
            return cell.isoformat()
        case _:
            return str(cell)


if __name__ == "__main__":
    write_sheet(Path(sys.argv[1]), int(sys.argv[2]))
