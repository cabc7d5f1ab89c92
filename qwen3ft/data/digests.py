"""The sha256 of files that seldom change, kept from one run to the next.

A kept digest counts while size, modification time, change time and inode of the file are those it
was computed with. The change time is what tells a file that was rewritten with its old time put
back (`cp -p`, `rsync -t`): no ordinary call can set it. A file touched less than `SETTLE_SECONDS`
ago is hashed and not kept, since another write within the same tick of the clock would not show.

Losing or damaging the file of digests costs time and nothing else.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

from qwen3ft.files import sha256_file, write_json_atomic

DIGESTS_FILE = "digests.json"

SETTLE_SECONDS = 2.0
"""Coarser than the clock of any file system in use; FAT's is the coarsest."""

Mark = tuple[int, int, int, int]
"""Size in bytes, modification and change time in ns, inode."""


class DigestCache:
    """Digests by the resolved path of the file.

    Args:
        path: The JSON file they are kept in; its folder is made when it is first written.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._kept = dict(_read(path))
        self._changed = False

    def sha256(self, file: Path) -> str:
        """Hex sha256 of the file's bytes.

        Raises:
            OSError: it cannot be read.
        """
        name, mark = str(file.resolve()), _mark(file)
        kept = self._kept.get(name)
        if kept is not None and kept[0] == mark:
            return kept[1]
        digest = sha256_file(file)
        if mark == _mark(file) and _is_settled(mark):
            self._kept[name] = (mark, digest)
            self._changed = True
        return digest

    def save(self) -> None:
        """Keep what was computed; a folder that cannot be written is no reason to fail."""
        if not self._changed:
            return
        kept = {name: [*mark, digest] for name, (mark, digest) in self._kept.items()}
        try:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            write_json_atomic(self._path, {name: kept[name] for name in _existing(kept)})
            self._changed = False
        except OSError:
            return


@contextmanager
def open_digests(cache_dir: Path) -> Iterator[DigestCache]:
    """The digests of a cache folder; what the body computed is kept when it ends."""
    cache = DigestCache(cache_dir / DIGESTS_FILE)
    try:
        yield cache
    finally:
        cache.save()


def _read(path: Path) -> Iterator[tuple[str, tuple[Mark, str]]]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        entries = [(str(name), values) for name, values in content.items()]
    except (OSError, ValueError, AttributeError):
        return
    for name, values in entries:
        match values:
            case [int(size), int(modified), int(changed), int(inode), str(digest)]:
                yield name, ((size, modified, changed, inode), digest)


def _mark(file: Path) -> Mark:
    found = file.stat()
    return found.st_size, found.st_mtime_ns, found.st_ctime_ns, found.st_ino


def _is_settled(mark: Mark) -> bool:
    return time.time_ns() - max(mark[1], mark[2]) > SETTLE_SECONDS * 1e9


def _existing(names: Iterable[str]) -> list[str]:
    return sorted(name for name in names if os.path.lexists(name))
