"""The sha256 of files that seldom change, kept from one run to the next.

A kept digest holds as long as the file has the size, times and inode it was computed with. What
that does not show: bytes that are written past the file system (a disk that fails, a device that is
mounted twice), and a clock that was set back to the nanosecond of the last change.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

from qwen3ft.disk.files import sha256_file, sha256_json, write_json_atomic

BESIDE = ("flows", "tasks", "deployments")
"""Packages beside `qwen3ft` in the repository, and below it in a wheel."""

DIGESTS_FILE = "digests.json"

# FAT's clock is the coarsest of the file systems in use.
_SETTLE_SECONDS = 2.0

# A file may be rewritten and get its old modification time back (`cp -p`, `rsync -t`). No ordinary
# call sets the change time, which therefore shows it.
Mark = tuple[int, int, int, int]
"""Size in bytes, modification and change time in ns, inode of a file."""


class DigestCache:
    """Digests by the resolved path of the file.

    Args:
        path: The JSON file they are kept in; its folder is made when it is first written.
        settle_seconds: A digest is kept once the file has been left alone for so long.
    """

    def __init__(self, path: Path, settle_seconds: float = _SETTLE_SECONDS) -> None:
        self._path, self._settle_seconds = path, settle_seconds
        self._kept = dict(_read(path))
        self._changed = False

    def sha256(self, file: Path) -> str:
        """Return the hex sha256 of the file's bytes.

        Raises:
            OSError: it cannot be read.
        """
        name, mark = str(file.resolve()), mark_of(file)
        kept = self._kept.get(name)
        if kept is not None and kept[0] == mark:
            return kept[1]
        digest = sha256_file(file)
        if mark == mark_of(file) and self._is_settled(mark):
            self._kept[name] = (mark, digest)
            self._changed = True
        return digest

    def save(self) -> None:
        """Write the digests if there are new ones; a folder that cannot be written is ignored."""
        if not self._changed:
            return
        kept = {name: [*mark, digest] for name, (mark, digest) in self._kept.items()}
        try:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            write_json_atomic(self._path, {name: kept[name] for name in _existing(kept)})
            self._changed = False
        except OSError:
            return

    def _is_settled(self, mark: Mark) -> bool:
        # Of two writes within one tick of the clock, the second would not show.
        return time.time_ns() - max(mark[1], mark[2]) > self._settle_seconds * 1e9


@contextmanager
def open_digests(cache_dir: Path, settle_seconds: float = _SETTLE_SECONDS) -> Iterator[DigestCache]:
    """Yield the digests of a cache folder, and save new ones at the end."""
    cache = DigestCache(cache_dir / DIGESTS_FILE, settle_seconds)
    try:
        yield cache
    finally:
        cache.save()


def _read(path: Path) -> Iterator[tuple[str, tuple[Mark, str]]]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        entries = [(str(name), values) for name, values in content.items()]
    except (OSError, ValueError, AttributeError):
        return  # without the digests of earlier runs files are hashed again, which costs only time
    for name, values in entries:
        match values:
            case [int(size), int(modified), int(changed), int(inode), str(digest)]:
                yield name, ((size, modified, changed, inode), digest)


def mark_of(file: Path) -> Mark:
    """Return what changes with every write to the file.

    Raises:
        OSError: it is not there.
    """
    found = file.stat()
    return found.st_size, found.st_mtime_ns, found.st_ctime_ns, found.st_ino


def _existing(names: Iterable[str]) -> list[str]:
    return sorted(name for name in names if os.path.lexists(name))


def code_digest() -> str:
    """Return the sha256 of all modules of qwen3ft, `flows`, `tasks` and `deployments`."""
    package = Path(__file__).parents[1]
    # in a wheel they lie below the package, and what is beside it belongs to others
    beside = [name for name in BESIDE if not (package / name).exists()]
    folders = (package, *(package.parent / name for name in beside))
    modules = sorted(path for folder in folders for path in folder.rglob("*.py"))
    root = package.parent
    return sha256_json([[str(path.relative_to(root)), sha256_file(path)] for path in modules])
