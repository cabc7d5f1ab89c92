"""Checksums of the journal's lines, which show that one was changed after it was written.

The last key of a line's object is `crc32`, computed over the line without it. Journals of earlier
versions have none; in a journal that begins with one, every line must have its own.
"""

from __future__ import annotations

import re
import zlib
from pathlib import Path

from qwen3ft.disk.files import lines_from

_SEAL = re.compile(rb',"crc32":"([0-9a-f]{8})"}\n?\Z')
_SEAL_BYTES = 21  # with the newline


def add_checksum(line: bytes) -> bytes:
    """Return a line, which is a JSON object with at least one key, with its checksum."""
    return line[:-1] + b',"crc32":"%08x"}' % zlib.crc32(line)


def find_change(line: bytes, *, expected: bool) -> str | None:
    """Say in which way a line is not what was written; None if it is.

    Args:
        line: With or without its newline.
        expected: Whether a line without a checksum is one that lost it.
    """
    seal = _SEAL.search(line, max(0, len(line) - _SEAL_BYTES))
    if seal is None:
        return "it has lost its checksum" if expected else None
    if int(seal[1], 16) != zlib.crc32(line[: seal.start()] + b"}"):
        return "it does not match its checksum"
    return None


def has_checksums(path: Path) -> bool:
    """Return True if the journal at `path` was begun by a version that writes checksums."""
    first = next(lines_from(path), None)
    return first is not None and find_change(first.content, expected=True) is None
