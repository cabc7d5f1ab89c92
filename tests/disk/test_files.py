"""Durable files: a reader sees the old or the new one."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from qwen3ft.disk.files import (
    append_json_line,
    lines_from,
    make_private,
    private_files,
    read_json_lines,
    sha256_json,
    write_bytes_atomic,
    write_json_atomic,
)
from qwen3ft.training import checkpoint


def test_an_interrupted_write_leaves_the_old_file(tmp_path: Path) -> None:
    """A value that cannot be serialised changes nothing and leaves no temporary file."""
    path = tmp_path / "value.json"
    write_json_atomic(path, {"a": 1})
    with pytest.raises(ValueError):
        write_json_atomic(path, {"a": float("nan")})
    assert json.loads(path.read_text()) == {"a": 1}
    assert [path.name for path in tmp_path.iterdir()] == ["value.json"]


def test_writes_are_synced_before_the_rename_and_the_folder_after_it(tmp_path: Path) -> None:
    """The order fsync(file), rename, fsync(folder), read from the audit of a real process."""
    program = (
        "import os, sys\n"
        "calls = []\n"
        "real_fsync, real_replace = os.fsync, os.replace\n"
        "import stat\n"
        "def fsync(fd):\n"
        "    calls.append('dir' if stat.S_ISDIR(os.fstat(fd).st_mode) else 'file')\n"
        "    real_fsync(fd)\n"
        "def replace(a, b):\n"
        "    calls.append('rename'); real_replace(a, b)\n"
        "os.fsync, os.replace = fsync, replace\n"
        "from pathlib import Path\n"
        "from qwen3ft.disk.files import write_bytes_atomic\n"
        "write_bytes_atomic(Path(sys.argv[1]), b'x')\n"
        "print(calls)\n"
    )
    command = [sys.executable, "-c", program, str(tmp_path / "f")]
    printed = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    assert printed.strip() == "['file', 'rename', 'dir']"


def test_a_process_killed_while_committing_leaves_the_last_checkpoint(tmp_path: Path) -> None:
    """SIGKILL at every fsync and rename of a commit: the old or the new checkpoint verifies."""
    program = (
        "import os, sys, signal\n"
        "from pathlib import Path\n"
        "countdown = int(sys.argv[2])\n"
        "def counted(real):\n"
        "    def call(*a, **k):\n"
        "        global countdown\n"
        "        countdown -= 1\n"
        "        if countdown == 0: os.kill(os.getpid(), signal.SIGKILL)\n"
        "        return real(*a, **k)\n"
        "    return call\n"
        "os.fsync, os.rename, os.replace = map(counted, (os.fsync, os.rename, os.replace))\n"
        "from qwen3ft.training import checkpoint\n"
        "def fill(folder): (folder / 'w').write_bytes(b'2' * 100)\n"
        "checkpoint.commit(Path(sys.argv[1]), 2, fill, {})\n"
    )
    checkpoint.commit(tmp_path, 1, lambda folder: _write(folder / "w", b"1" * 100), {})
    steps = []
    for countdown in range(1, 40):
        command = [sys.executable, "-c", program, str(tmp_path), str(countdown)]
        finished = subprocess.run(command, check=False).returncode == 0
        newest = checkpoint.newest_verified([tmp_path])
        assert newest is not None
        steps.append(newest.step)
        if finished:
            break
    assert finished
    assert steps == sorted(steps)
    assert {1, 2} == set(steps)


def test_newest_verified_passes_over_damage_and_other_lineages(tmp_path: Path) -> None:
    """A corrupt newest checkpoint costs one interval; another run's checkpoint is never used."""
    for step in (1, 2, 3):
        facts = {"data": "same" if step < 3 else "other"}
        checkpoint.commit(tmp_path, step, lambda folder: _write(folder / "w", b"w"), facts)
    newest = checkpoint.newest_verified([tmp_path], {"data": "same"})
    assert newest is not None
    assert newest.step == 2
    (newest.path / "w").write_bytes(b"v")
    older = checkpoint.newest_verified([tmp_path], {"data": "same"})
    assert older is not None
    assert older.step == 1


def test_pruning_keeps_the_best_and_the_newest(tmp_path: Path) -> None:
    """Old checkpoints go; the best and the newest two stay, all of them if the newest is bad."""
    for step in range(1, 7):
        checkpoint.commit(tmp_path, step, lambda folder: _write(folder / "w", b"w"), {})
    (tmp_path / "step-000006" / "w").write_bytes(b"bad")
    checkpoint.prune(tmp_path, keep=2, best_step=2)
    assert len(checkpoint.list_checkpoints([tmp_path])) == 6
    checkpoint.commit(tmp_path, 7, lambda folder: _write(folder / "w", b"w"), {})
    checkpoint.prune(tmp_path, keep=2, best_step=2)
    assert [c.step for c in checkpoint.list_checkpoints([tmp_path])] == [2, 6, 7]


def test_a_torn_last_line_is_left_for_later(tmp_path: Path) -> None:
    """Readers of a growing file see whole lines only, and go on where they stopped."""
    path = tmp_path / "lines.jsonl"
    assert read_json_lines(path) == []
    append_json_line(path, {"n": 1})
    with path.open("ab") as stream:
        stream.write(b'{"n": ')
    assert read_json_lines(path) == [{"n": 1}]
    (first,) = lines_from(path)
    with path.open("ab") as stream:
        stream.write(b"2}\n")
    assert [line.content for line in lines_from(path, first.end_offset)] == [b'{"n": 2}\n']


def test_the_hash_of_a_value_ignores_the_order_of_keys() -> None:
    """Two dicts that are equal have one hash."""
    assert sha256_json({"a": 1, "b": [2]}) == sha256_json({"b": [2], "a": 1})
    assert sha256_json({"a": 1}) != sha256_json({"a": 2})


def test_an_unwritable_folder_is_an_error_not_a_loss(tmp_path: Path) -> None:
    """Writing below a regular file raises and changes nothing."""
    blocker = tmp_path / "file"
    blocker.write_text("x")
    with pytest.raises(OSError):
        write_bytes_atomic(blocker / "below", b"x")
    assert blocker.read_text() == "x"


def _write(path: Path, content: bytes) -> None:
    path.write_bytes(content)


def test_what_others_could_read_becomes_private(tmp_path: Path) -> None:
    """Programs stay executable; links, which have no rights of their own, lead to what they did."""
    outside = tmp_path / "outside"
    outside.write_text("shared")
    outside.chmod(0o644)
    folder = tmp_path / "folder"
    (folder / "inner").mkdir(parents=True)
    for name, mode in (("inner/data", 0o644), ("program", 0o755), ("private", 0o400)):
        (folder / name).touch()
        (folder / name).chmod(mode)
    (folder / "link").symlink_to(outside)
    (folder / "dangling").symlink_to(tmp_path / "nowhere")
    folder.chmod(0o777)
    make_private(folder)
    modes = {name: (folder / name).stat().st_mode & 0o777 for name in (".", "inner", "program")}
    assert modes == {".": 0o700, "inner": 0o700, "program": 0o700}
    assert (folder / "inner" / "data").stat().st_mode & 0o777 == 0o600
    assert (folder / "private").stat().st_mode & 0o777 == 0o400
    assert outside.stat().st_mode & 0o777 == 0o644


def test_what_a_process_writes_is_private_while_it_asks_for_that(tmp_path: Path) -> None:
    """So is what its children write."""
    before = os.umask(0o022)
    try:
        with private_files():
            subprocess.run(["sh", "-c", "mkdir a; touch a/b"], cwd=tmp_path, check=True)
        (tmp_path / "c").touch()
    finally:
        os.umask(before)
    modes = [(tmp_path / name).stat().st_mode & 0o777 for name in ("a", "a/b", "c")]
    assert modes == [0o700, 0o600, 0o644]
