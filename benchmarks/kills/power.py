"""A power cut for one process: afterwards its folder holds only what was synced.

`record_syncs` makes every fsync of this process copy what it makes durable: the content of a file,
or the names in a folder, each under its inode number. After a kill, `drop_unsynced` builds the
folder anew from these copies: names that no fsync of their folder covered are gone or are what they
were, and files hold what their last fsync covered. That is the least that POSIX promises; real file
systems keep more. Files from before the recording count as durable.
"""

from __future__ import annotations

import json
import os
import shutil
import stat
from pathlib import Path

_HELD: list[int] = []
"""Descriptors of synced files: while one is open, its inode number is not given to another file."""


def record_syncs(root: Path, records: Path) -> None:
    """Record from now on, in the empty folder `records`, what this process syncs below `root`."""
    for folder, _, _ in os.walk(root):
        _record_names(Path(folder), records)
    before = {path.stat().st_ino: str(path) for path in root.rglob("*") if path.is_file()}
    (records / "before.json").write_text(json.dumps(before), encoding="utf-8")
    sync = os.fsync

    def recorded(file: int) -> None:
        sync(file)
        path = Path(f"/proc/self/fd/{file}").readlink()
        if not path.is_relative_to(root):
            return
        if stat.S_ISDIR(os.fstat(file).st_mode):
            _record_names(path, records)
        else:
            _HELD.append(os.dup(file))
            _write(records / str(os.fstat(file).st_ino), path.read_bytes())

    os.fsync = recorded


def _record_names(folder: Path, records: Path) -> None:
    names = {entry.name: entry.inode() for entry in os.scandir(folder)}
    _write(records / f"{folder.stat().st_ino}.names", json.dumps(names).encode())


def _write(path: Path, content: bytes) -> None:
    new = path.with_suffix(".new")
    new.write_bytes(content)
    new.rename(path)  # whoever is killed in here has recorded all of it or nothing


def drop_unsynced(root: Path, records: Path) -> None:
    """Reduce `root` to what the recorded process had made durable; it must have ended."""
    before = {
        int(inode): Path(path)
        for inode, path in json.loads((records / "before.json").read_text("utf-8")).items()
    }
    survived = root.with_name(f".{root.name}.survived")
    _restore(root.stat().st_ino, survived, records, before)
    shutil.rmtree(root)
    survived.rename(root)


def _restore(inode: int, target: Path, records: Path, before: dict[int, Path]) -> None:
    """Write what is durable of the folder `inode` as `target`."""
    target.mkdir()
    durable = records / f"{inode}.names"
    names = json.loads(durable.read_text("utf-8")) if durable.exists() else {}
    for name, child in names.items():
        content, old = records / str(child), before.get(child)
        if (records / f"{child}.names").exists():
            _restore(child, target / name, records, before)
        elif content.exists():
            shutil.copyfile(content, target / name)
        elif old is None:
            (target / name).touch()  # its name was synced, its content never
        elif old.is_file():
            shutil.copyfile(old, target / name)
