"""Files that others rely on: written so that a reader sees the old or the new content, never half.

A write goes to a temporary name in the same folder, is fsynced and renamed, and its folder fsynced,
so that it survives a kill at any point and a power cut after it returned.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import stat
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from io import BufferedRandom
from pathlib import Path
from typing import Any, NamedTuple

from qwen3ft.errors import EnvironmentNotReadyError
from qwen3ft.faults import reach
from qwen3ft.logs import get_logger
from qwen3ft.text.commands import shell_line
from qwen3ft.units import MIB, size_text

logger = get_logger("files")

PRIVATE_UMASK = 0o077
"""Umask of every process of the project: other users of the machine can read nothing it writes."""

MOST_JSON_BYTES = 16 * MIB
"""Largest JSON file that is read whole; parsed, it takes up to 25 times as much memory."""


@contextmanager
def private_files() -> Iterator[None]:
    """Let only this user read what the process and its children write in the body."""
    before = os.umask(PRIVATE_UMASK)
    try:
        yield
    finally:
        os.umask(before)


def make_private(folder: Path) -> None:
    """Take from other users all rights to `folder` and what is in it; links are not followed."""
    for parent, folders, files in os.walk(folder):
        for path in (Path(parent), *(Path(parent, name) for name in (*folders, *files))):
            with suppress(FileNotFoundError):  # a temporary file of a running server
                mode = stat.S_IMODE(path.lstat().st_mode)
                if mode & PRIVATE_UMASK and not path.is_symlink():
                    path.chmod(mode & ~PRIVATE_UMASK)


def fsync_dir(path: Path) -> None:
    """Make renames inside the folder `path` durable."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def make_folder(path: Path, mode: int = 0o777) -> None:
    """Create the folder `path` and its parents durably, as far as they are missing.

    Args:
        path: The folder; what it holds can only be as durable as its own name.
        mode: Permissions of the last folder, less the umask.
    """
    missing = [folder for folder in (path, *path.parents) if not folder.exists()]
    path.mkdir(mode=mode, parents=True, exist_ok=True)
    for folder in missing:
        fsync_dir(folder.parent)


def fsync_file(path: Path) -> None:
    """Make the content of a file written by a library durable."""
    with path.open("rb+") as stream:
        os.fsync(stream.fileno())


def is_listed(path: Path) -> bool:
    """Return True if a file is there as its folder lists it now, and not as NFS remembers it.

    A client of NFS may say for a minute that a file is missing which it once looked for in vain;
    a folder that is opened is asked for anew.
    """
    try:
        return path in path.parent.iterdir()
    except OSError:
        return False


def write_bytes_atomic(path: Path, content: bytes) -> None:
    """Replace `path` by `content`, durably; the parent folder must exist."""
    descriptor, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(descriptor, "wb") as stream:
            stream.write(content)
            stream.flush()
            reach("file.written")
            os.fsync(stream.fileno())
        reach("file.synced")
        os.replace(temporary, path)
    except BaseException:  # nothing is left behind, whatever interrupts it
        Path(temporary).unlink(missing_ok=True)
        raise
    reach("file.renamed")
    fsync_dir(path.parent)


def write_json_atomic(path: Path, value: Any) -> None:
    """Replace `path` by `value` as indented UTF-8 JSON, durably."""
    text = json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False)
    write_bytes_atomic(path, text.encode() + b"\n")


def append_json_line(path: Path, value: Any) -> None:
    """Append `value` as one line of JSON."""
    append_line(path, json.dumps(value, ensure_ascii=False, allow_nan=False).encode())


def append_line(path: Path, line: bytes) -> None:
    """Append `line` and a newline; if the last line has none, it costs only itself."""
    with path.open("ab+") as stream:
        stream.write((b"" if _ends_a_line(stream) else b"\n") + line + b"\n")


def end_last_line(path: Path) -> None:
    """Add the newline that the last line of `path` lacks if its writer was killed."""
    with path.open("ab+") as stream:
        if not _ends_a_line(stream):
            stream.write(b"\n")


def _ends_a_line(stream: BufferedRandom) -> bool:
    """Return whether what is appended to `stream` begins a line."""
    if not stream.tell():
        return True
    stream.seek(-1, os.SEEK_END)
    return stream.read(1) == b"\n"


class Line(NamedTuple):
    """One line of a file, and the offset in bytes just after it."""

    content: bytes
    end_offset: int


def lines_from(path: Path, offset: int = 0, *, ended: bool = False) -> Iterator[Line]:
    """Yield the lines of `path` from byte `offset` on; none if there is no such file.

    Args:
        path: The file.
        offset: End of the lines that were read before.
        ended: Whether nobody writes it any more. Otherwise a last line without its newline is left
            for a later call, as it may not be complete.
    """
    try:
        stream = path.open("rb")
    except FileNotFoundError:
        return
    with stream:
        stream.seek(offset)
        for content in stream:
            if not ended and not content.endswith(b"\n"):
                return
            offset += len(content)
            yield Line(content, offset)


def read_json_lines(path: Path) -> list[dict[str, Any]]:
    """Return every JSON line of `path`; none if there is no such file.

    A last line that is cut off is skipped with a warning.

    Raises:
        ValueError: another line is not JSON.
    """
    values = []
    for line in lines_from(path, ended=True):
        try:
            values += [json.loads(line.content)] if line.content.strip() else []
        except ValueError:
            if line.content.endswith(b"\n"):
                raise
            logger.warning("the last line of %s is cut off and skipped", path)
    return values


def open_regular(path: Path) -> int:
    """Open a file that somebody else may have made; return its descriptor.

    Raises:
        ValueError: there is none, or it is a folder, a pipe or a device, which may never end.
    """
    try:
        # Without O_NONBLOCK, opening a pipe waits for its writer.
        descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    except OSError as error:
        raise ValueError(f"{path.name!a} cannot be read ({error.strerror})") from error
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise ValueError(f"{path.name!a} is not a regular file")
    return descriptor


def read_foreign_json(path: Path, most_bytes: int = MOST_JSON_BYTES) -> Any:
    """Read a JSON file that somebody else may have made.

    Raises:
        ValueError: it is not a regular file of at most `most_bytes`, or not JSON in UTF-8.
    """
    with os.fdopen(open_regular(path), "rb") as stream:
        content = stream.read(most_bytes + 1)
    if len(content) > most_bytes:
        raise ValueError(f"{path.name!a} has more than {most_bytes // MIB} MiB")
    try:
        return json.loads(content)
    except RecursionError:
        raise ValueError(f"{path.name!a} is nested too deeply") from None
    except ValueError as error:  # the text of a UnicodeDecodeError quotes the whole file
        reason = str(error) if isinstance(error, json.JSONDecodeError) else type(error).__name__
        raise ValueError(f"{path.name!a} is not JSON ({reason[:200]})") from None


def sha256_file(path: Path) -> str:
    """Return the hex sha256 of a file."""
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def sha256_json(value: Any) -> str:
    """Return the hex sha256 of a JSON-compatible value, whatever the order of its keys."""
    text = json.dumps(value, sort_keys=True, ensure_ascii=False, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()


def require_disk(target: Path, needed_bytes: int, what: str, why: str) -> None:
    """Create the parent of `target` and check that it has `needed_bytes` free.

    Args:
        target: File or folder that will be written.
        needed_bytes: Largest size of it.
        what: Its name, to begin the message with.
        why: Cause, for the message.

    Raises:
        EnvironmentNotReadyError: less is free; its facts hold both sizes, in bytes.
    """
    target.parent.mkdir(parents=True, exist_ok=True)
    free_bytes = shutil.disk_usage(target.parent).free
    if free_bytes < needed_bytes:
        raise EnvironmentNotReadyError(
            f"{what} needs {size_text(needed_bytes)} at {target.parent}, "
            f"{size_text(free_bytes)} are free.",
            why=why,
            next_command=shell_line("df", "-h", target.parent),
            needed_bytes=needed_bytes,
            free_bytes=free_bytes,
        )
