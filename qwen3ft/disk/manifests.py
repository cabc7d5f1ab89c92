"""Folders that others rely on: complete or absent, and what was written.

A folder is complete only if its manifest, written last, lists every file with its size and sha256
and all of them match.
"""

from __future__ import annotations

import ctypes
import errno
import os
import re
import shutil
import tempfile
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

from qwen3ft.disk.files import (
    fsync_dir,
    fsync_file,
    make_folder,
    read_foreign_json,
    sha256_file,
    write_json_atomic,
)
from qwen3ft.faults import reach

MANIFEST_NAME = "manifest.json"

_AT_FDCWD, _RENAME_EXCHANGE = -100, 2
"""Constants of the kernel (fcntl.h, fs.h): paths as they are; both names stay, exchanged."""

_STAGING = re.compile(r"\.(?P<target>.+?)(?P<retired>\.old)?\.[a-z0-9_]{8}")
"""Names that `tempfile.mkdtemp` makes in `build_folder`."""


def files_below(folder: Path) -> Iterator[Path]:
    """Yield every regular file below `folder` except the manifest, sorted; links are skipped."""
    for path in sorted(folder.rglob("*")):
        if path.is_file() and not path.is_symlink() and path.name != MANIFEST_NAME:
            yield path


def write_manifest(folder: Path, facts: dict[str, Any] | None = None) -> str:
    """Fsync every file of `folder`, then write the manifest that makes it complete.

    Returns:
        The sha256 of the manifest.
    """
    files = {}
    for path in files_below(folder):
        fsync_file(path)
        files[path.relative_to(folder).as_posix()] = {
            "size_bytes": path.stat().st_size,
            "sha256": sha256_file(path),
        }
    for directory in [folder, *(path for path in folder.rglob("*") if path.is_dir())]:
        fsync_dir(directory)
    write_json_atomic(folder / MANIFEST_NAME, {"files": files, "facts": facts or {}})
    return sha256_file(folder / MANIFEST_NAME)


def read_manifest_facts(folder: Path) -> dict[str, Any]:
    """Return the facts in a folder's manifest; empty if there is none that can be read."""
    try:
        manifest = read_foreign_json(folder / MANIFEST_NAME)
    except ValueError:
        return {}
    facts = manifest.get("facts") if isinstance(manifest, dict) else None
    return facts if isinstance(facts, dict) else {}


def find_damage(folder: Path, required: Iterable[str] = ()) -> str | None:
    """Say how `folder` differs from its manifest; None if it does not.

    Args:
        folder: Folder that `write_manifest` completed.
        required: Files that will be read, so the manifest has to list them.
    """
    manifest_path = folder / MANIFEST_NAME
    if not manifest_path.is_file():
        return f"{manifest_path} is missing"
    try:
        files = read_foreign_json(manifest_path)["files"]
        expected = {name: (entry["size_bytes"], entry["sha256"]) for name, entry in files.items()}
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        return f"{manifest_path} is unreadable ({type(error).__name__})"
    if not expected:
        return f"{manifest_path} lists no file"
    if unlisted := sorted(set(required) - expected.keys()):
        return f"{manifest_path} does not list {', '.join(unlisted)}"
    try:
        for name, (size_bytes, _) in expected.items():
            if damage := _misplaced(folder, name, size_bytes):
                return damage
        for name, (_, digest) in expected.items():
            if sha256_file(folder / name) != digest:
                return f"{folder / name} does not match its sha256"
    except (OSError, ValueError) as error:  # a name that no file can have
        return f"{manifest_path} lists a file that cannot be read ({error})"
    return None


def _misplaced(folder: Path, name: str, size_bytes: int) -> str | None:
    """Say why `name` cannot be the file of that size in `folder`; None if it can."""
    path = folder / name
    if not path.resolve().is_relative_to(folder.resolve()):
        return f"{name!a} leads out of {folder}"
    if not path.is_file():
        return f"{name!a} is missing in {folder}"
    if path.stat().st_size != size_bytes:
        return f"{path} has {path.stat().st_size} bytes instead of {size_bytes}"
    return None


def is_left_behind(path: Path) -> bool:
    """Return True if `path` is a folder that a killed `build_folder` left behind.

    A replaced folder only counts while its successor exists: otherwise it is the only copy.
    """
    found = _STAGING.fullmatch(path.name)
    if found is None or not path.is_dir():
        return False
    return found["retired"] is None or path.with_name(found["target"]).exists()


def build_folder(
    target: Path, fill: Callable[[Path], None], facts: dict[str, Any] | None = None
) -> str:
    """Create the folder `target` with the files that `fill` writes, all or nothing.

    An older `target` stays in place until the new one is complete, and is exchanged with it in one
    step; only on a file system that cannot do that is there a moment with neither.

    Returns:
        The sha256 of the new manifest.
    """
    make_folder(target.parent)
    staging = Path(tempfile.mkdtemp(dir=target.parent, prefix=f".{target.name}."))
    try:
        fill(staging)
        reach("folder.filled")
        digest = write_manifest(staging, facts)
        reach("folder.listed")
        if not target.exists():
            os.rename(staging, target)
        elif _exchange(staging, target):
            reach("folder.exchanged")
            shutil.rmtree(staging, ignore_errors=True)
        else:
            retired = Path(tempfile.mkdtemp(dir=target.parent, prefix=f".{target.name}.old."))
            os.rename(target, retired / "folder")
            reach("folder.retired")
            os.rename(staging, target)
            shutil.rmtree(retired, ignore_errors=True)
        reach("folder.renamed")
        fsync_dir(target.parent)
    except BaseException:  # nothing is left behind, whatever interrupts it
        shutil.rmtree(staging, ignore_errors=True)
        raise
    return digest


def _exchange(one: Path, other: Path) -> bool:
    """Exchange two folders in one step; return whether the system can (renameat2, Linux 3.15)."""
    try:
        renameat2 = ctypes.CDLL(None, use_errno=True).renameat2
    except AttributeError:  # another C library
        return False
    here = _AT_FDCWD
    if renameat2(here, os.fsencode(one), here, os.fsencode(other), _RENAME_EXCHANGE) == 0:
        return True
    number = ctypes.get_errno()
    if number in (errno.ENOSYS, errno.EINVAL, errno.EOPNOTSUPP):
        return False
    raise OSError(number, os.strerror(number), str(one), None, str(other))
