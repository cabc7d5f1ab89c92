"""Folders with a manifest: complete or absent, and damage is always found."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from qwen3ft.disk.files import write_json_atomic
from qwen3ft.disk.manifests import build_folder, find_damage


def make_folder(path: Path, content: bytes = b"x" * 1000) -> Path:
    def fill(folder: Path) -> None:
        (folder / "a.bin").write_bytes(content)
        (folder / "sub").mkdir()
        (folder / "sub" / "b.json").write_text("{}")

    build_folder(path, fill, {"step": 1})
    return path


def test_every_kind_of_damage_is_found(tmp_path: Path) -> None:
    """Truncation, a flipped bit, a missing file, a lost or broken manifest: each is named."""
    folder = make_folder(tmp_path / "folder")
    assert find_damage(folder) is None
    target = folder / "a.bin"
    content = target.read_bytes()
    for position in range(0, 1000, 97):
        flipped = bytearray(content)
        flipped[position] ^= 1
        target.write_bytes(flipped)
        assert "sha256" in (find_damage(folder) or "")
    for length in range(0, 1000, 97):
        target.write_bytes(content[:length])
        assert "bytes instead of 1000" in (find_damage(folder) or "")
    target.unlink()
    assert "is missing" in (find_damage(folder) or "")
    target.write_bytes(content)
    assert find_damage(folder) is None
    manifest = folder / "manifest.json"
    text = manifest.read_text()
    manifest.write_text(text[: len(text) // 2])
    assert "unreadable" in (find_damage(folder) or "")
    manifest.unlink()
    assert "is missing" in (find_damage(folder) or "")


def test_a_manifest_cannot_lead_out_of_its_folder(tmp_path: Path) -> None:
    """A file name with '..' is refused before anything is read."""
    folder = make_folder(tmp_path / "folder")
    content = json.loads((folder / "manifest.json").read_text())
    content["files"]["../outside"] = {"size_bytes": 0, "sha256": ""}
    write_json_atomic(folder / "manifest.json", content)
    assert "leads out" in (find_damage(folder) or "")


def test_a_failed_build_keeps_the_old_folder(tmp_path: Path) -> None:
    """Building is all or nothing: an error leaves the old folder and no leftovers."""
    folder = make_folder(tmp_path / "folder", b"old")

    def fail(path: Path) -> None:
        (path / "a.bin").write_bytes(b"new")
        raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"):
        build_folder(folder, fail)
    assert find_damage(folder) is None
    assert (folder / "a.bin").read_bytes() == b"old"
    assert [path.name for path in tmp_path.iterdir()] == ["folder"]
