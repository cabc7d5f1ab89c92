"""Rows of xlsx and ods files: of the first visible sheet that is not empty, named by its first row.

The file is read in a process of its own, `sheet_process`, which may take a bounded amount of memory
and of CPU time: the library holds a whole sheet, and a small file may unpack to a huge one.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable, Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import IO

from qwen3ft.data.readers.raw import (
    RawRow,
    UnreadableFileError,
    bad_row,
    refuse_repeated,
    usable_names,
)
from qwen3ft.data.readers.sheet_process import MOST_BYTES, MOST_SECONDS
from qwen3ft.machine.installing import extra_command
from qwen3ft.units import gb

SHEET_SUFFIXES = (".xlsx", ".xlsm", ".ods")


def can_read_sheets() -> bool:
    """Return whether the library for them is installed."""
    return find_spec("python_calamine") is not None


def why_no_sheets(suffix: str) -> str:
    """Return why such files cannot be read without the library, and the command for it."""
    return f"{suffix} files need another package: {extra_command('sheets')}"


def read_sheet(path: Path, limit: int, note: Callable[[str], None]) -> Iterator[RawRow]:
    """Yield a row for each row of cells that is not empty; its line is its number in the sheet.

    Raises:
        UnreadableFileError: it is damaged or too large, or the library is missing.
        OSError: it cannot be opened.
    """
    if not can_read_sheets():
        raise UnreadableFileError(why_no_sheets(path.suffix))
    path.open("rb").close()
    command = [sys.executable, "-m", "qwen3ft.data.readers.sheet_process", str(path), str(limit)]
    with subprocess.Popen(
        command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL
    ) as process:
        try:
            assert process.stdout is not None
            yield from _rows(process.stdout, note)
        finally:
            process.kill()


def _rows(lines: IO[bytes], note: Callable[[str], None]) -> Iterator[RawRow]:
    names: list[str] | None = None
    for line in lines:
        match json.loads(line):
            case {"note": text}:
                note(text)
            case {"error": text}:
                raise UnreadableFileError(text)
            case {"row": number, "too_large": head}:
                yield bad_row(number, -1, "row_too_large", head)
            case {"row": _, "values": values} if names is None:
                names = usable_names(values)
                refuse_repeated(names)
            case {"row": number, "values": values}:
                yield RawRow(number, dict(zip(names or (), values, strict=True)))
            case _:
                return
    raise UnreadableFileError(
        f"it takes more than {gb(MOST_BYTES):.0f} GB of memory or {MOST_SECONDS} CPU seconds to "
        "read, or is damaged; save its sheet as csv"
    )
