"""A lock is free once its holder is gone, whatever it left in the file."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from flows.run_context import open_run
from qwen3ft.config import TrainingConfig
from qwen3ft.disk.locks import try_lock
from qwen3ft.machine.gpu_lock import Holder, hold_gpu, read_holder
from qwen3ft.operations.run_state import is_running

DEAD = Holder(pid=4_000_000, host="a-machine-that-is-gone", run_id="old", since="2020-01-01T00:00Z")
"""The note of a holder on a machine that lost its power."""


@pytest.mark.parametrize("note", [b"", DEAD.model_dump_json().encode(), b"\x00" * 4096])
def test_what_a_dead_machine_left_in_a_lock_file_holds_nothing(tmp_path: Path, note: bytes) -> None:
    """Neither the note of another host nor a file of zeros, as power cuts leave, is in the way."""
    path = tmp_path / "gpu-1.lock"
    path.write_bytes(note)
    with hold_gpu("gpu-1", "new", when_busy="refuse", wait_seconds=0.0, folder=tmp_path):
        holder = read_holder(path)
        assert holder is not None
        assert (holder.run_id, holder.pid) == ("new", os.getpid())
    with try_lock(path) as mine:
        assert mine


def test_the_lock_of_a_process_that_was_stopped_holds_until_it_is_killed(tmp_path: Path) -> None:
    """A holder that hangs still holds; SIGKILL frees the lock at once."""
    path = tmp_path / "run.lock"
    program = (
        "import sys; from pathlib import Path; from qwen3ft.disk.locks import lock_file;"
        "lock_file(Path(sys.argv[1])); print('held', flush=True); sys.stdin.read()"
    )
    pipe = subprocess.PIPE
    holder = subprocess.Popen([sys.executable, "-c", program, str(path)], stdin=pipe, stdout=pipe)
    try:
        assert holder.stdout is not None
        assert holder.stdout.readline() == b"held\n"
        holder.send_signal(signal.SIGSTOP)
        with try_lock(path) as mine:
            assert not mine
    finally:
        holder.kill()
        holder.communicate()
    with try_lock(path) as mine:
        assert mine


def test_a_run_of_a_machine_that_is_gone_can_be_continued(tmp_path: Path) -> None:
    """Its folder has a lock file that nobody holds: it is not running, and opens at once."""
    config = TrainingConfig(model_name="embedded", runs_dir=str(tmp_path))
    with open_run(config, "run-1", None) as run:
        assert is_running(run)
    run.lock.write_bytes(DEAD.model_dump_json().encode())
    assert not is_running(run)
    with open_run(config, "run-1", None) as again:
        assert again == run
