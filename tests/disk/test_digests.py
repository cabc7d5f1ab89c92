"""Kept digests are never another file's, and a file that is the same is not read twice."""

from __future__ import annotations

import hashlib
import os
import shutil
import time
from pathlib import Path

import pytest

from qwen3ft.disk import digests as data_digest
from qwen3ft.disk.digests import DIGESTS_FILE, DigestCache, open_digests


def sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def read_count(monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    """Return a list that receives the files read from here on."""
    read: list[Path] = []
    real = data_digest.sha256_file

    def counted(path: Path) -> str:
        read.append(path)
        return real(path)

    monkeypatch.setattr(data_digest, "sha256_file", counted)
    return read


def test_an_unchanged_file_is_read_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """By another process too, and its digest is right each time."""
    file, read = tmp_path / "rows.jsonl", read_count(monkeypatch)
    file.write_bytes(b"rows")
    for _ in range(3):
        with open_digests(tmp_path / "cache", settle_seconds=0) as digests:
            assert digests.sha256(file) == sha256(b"rows")
    assert read == [file]


def test_a_change_that_keeps_size_and_modification_time_is_seen(tmp_path: Path) -> None:
    """`cp -p` of another version makes such a change."""
    file = tmp_path / "rows.jsonl"
    file.write_bytes(b"old.")
    with open_digests(tmp_path, settle_seconds=0) as digests:
        digests.sha256(file)
    found = file.stat()
    time.sleep(0.02)  # one tick of the kernel's clock
    file.write_bytes(b"new.")
    os.utime(file, ns=(found.st_atime_ns, found.st_mtime_ns))
    assert file.stat().st_mtime_ns == found.st_mtime_ns
    assert DigestCache(tmp_path / DIGESTS_FILE).sha256(file) == sha256(b"new.")


def test_a_file_that_was_just_written_is_not_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A second write in the same tick would leave every mark as it is."""
    file, read = tmp_path / "rows.jsonl", read_count(monkeypatch)
    file.write_bytes(b"rows")
    for _ in range(2):
        with open_digests(tmp_path) as digests:
            digests.sha256(file)
    assert read == [file, file]


@pytest.mark.parametrize("content", ["", "[]", '{"a": 1}', '{"a": [1, 2]}', "\x00", None])
def test_a_damaged_file_of_digests_costs_nothing_but_time(
    tmp_path: Path, content: str | None
) -> None:
    """Unreadable, of another shape, or no file at all: everything is hashed anew."""
    file, kept = tmp_path / "rows.jsonl", tmp_path / DIGESTS_FILE
    file.write_bytes(b"rows")
    kept.mkdir() if content is None else kept.write_text(content)
    with open_digests(tmp_path, settle_seconds=0) as digests:
        assert digests.sha256(file) == sha256(b"rows")


def test_digests_of_files_that_are_gone_are_dropped(tmp_path: Path) -> None:
    """A data folder with a new file each night does not make the file of digests grow for ever."""
    for number in range(3):
        file = tmp_path / f"{number}.jsonl"
        file.write_text("rows")
        with open_digests(tmp_path, settle_seconds=0) as digests:
            digests.sha256(file)
        file.unlink()
    assert (tmp_path / DIGESTS_FILE).read_text().count("jsonl") == 1


def test_the_digest_of_the_code_changes_with_any_module(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Those of other packages too: hosts with different ones must not train together."""
    repository = Path(data_digest.__file__).parents[2]
    for name in ("qwen3ft", *data_digest.BESIDE):
        shutil.copytree(
            repository / name, tmp_path / name, ignore=shutil.ignore_patterns("__pycache__")
        )
    found = [data_digest.code_digest()]
    copy = tmp_path / "qwen3ft"
    monkeypatch.setattr(data_digest, "__file__", str(copy / "disk" / "digests.py"))
    assert data_digest.code_digest() == found[0]
    for module in ("qwen3ft/training/fused/block.py", "flows/join.py"):
        with (tmp_path / module).open("a", encoding="utf-8") as stream:
            stream.write("# changed\n")
        found.append(data_digest.code_digest())
    assert len(set(found)) == 3
    for name in data_digest.BESIDE:  # as in a wheel
        (tmp_path / name).rename(copy / name)
    found.append(data_digest.code_digest())
    (tmp_path / "flows").mkdir()
    (tmp_path / "flows" / "of_somebody_else.py").touch()
    assert data_digest.code_digest() == found[-1]
