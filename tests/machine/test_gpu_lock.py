"""One run at a time holds a GPU: real processes contend, are killed, and wait."""

from __future__ import annotations

import json
import logging
import os
import signal
import stat
import subprocess
import sys
import textwrap
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from qwen3ft.config import TrainingConfig
from qwen3ft.errors import EnvironmentNotReadyError
from qwen3ft.jobs.folders import RunDir
from qwen3ft.machine import gpu_lock
from qwen3ft.machine.gpu_lock import CPU, hold_gpu, read_holder
from qwen3ft.records.machine import GpuInfo

GPU = "GPU-6a3b0f52-0000-1111-2222-333344445555"

HOLD = """
    import subprocess, sys, time
    from pathlib import Path
    from qwen3ft.machine.gpu_lock import hold_gpu
    gpu, folder, child = sys.argv[1:]
    with hold_gpu(gpu, "run-a", when_busy="refuse", wait_seconds=0, folder=Path(folder)):
        pid = subprocess.Popen(["sleep", "60"]).pid if child == "child" else 0
        print(pid, flush=True)
        time.sleep(60)
"""

CONTEND = """
    import os, sys, time
    from pathlib import Path
    from qwen3ft.machine.gpu_lock import hold_gpu
    folder, processes, times = Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3])
    counter, children = folder / "counter", []
    counter.write_text("0")
    def contend():
        for _ in range(times):
            with hold_gpu("GPU-0", "run", when_busy="wait", wait_seconds=240, folder=folder):
                os.close(os.open(folder / "inside", os.O_CREAT | os.O_EXCL))  # fails for a second
                seen = int(counter.read_text())
                time.sleep(0.001)
                counter.write_text(str(seen + 1))
                os.unlink(folder / "inside")
    for _ in range(processes):
        if (child := os.fork()) == 0:
            contend()
            os._exit(0)
        children.append(child)
    failed = sum(os.waitpid(child, 0)[1] != 0 for child in children)
    print(failed, counter.read_text())
"""

Start = Callable[..., "subprocess.Popen[str]"]


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Start]:
    """Start a program that holds the GPU; kill the programs at the end."""
    started: list[subprocess.Popen[str]] = []

    def run(child: str = "alone") -> subprocess.Popen[str]:
        command = [sys.executable, "-c", textwrap.dedent(HOLD), GPU, str(tmp_path), child]
        process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
        started.append(process)
        return process

    yield run
    for process in started:
        process.kill()
        process.wait()


@pytest.fixture
def hold(tmp_path: Path) -> Callable[..., Any]:
    """Return a function that takes the GPU for run-b, and refuses at once if it is busy."""

    def take(gpu: str = GPU, wait: float = 0, **more: Any) -> Any:
        when_busy = "wait" if wait else "refuse"
        return hold_gpu(
            gpu, "run-b", when_busy=when_busy, wait_seconds=wait, folder=tmp_path, **more
        )

    return take


def first_line(process: subprocess.Popen[str]) -> str:
    assert process.stdout is not None
    return process.stdout.readline().strip()


def test_a_second_run_is_refused_with_the_holder_of_the_gpu(start: Start, hold: Any) -> None:
    """Pid, run and since when; and the command that would wait instead."""
    process = start()
    first_line(process)
    with pytest.raises(EnvironmentNotReadyError) as caught, hold():
        pass
    assert f"Run run-a (pid {process.pid} on " in caught.value.what
    assert "since 20" in caught.value.what
    assert GPU in caught.value.what
    assert "when_gpu_is_busy=wait" in caught.value.next_command
    assert caught.value.facts["holder"]["pid"] == process.pid
    json.dumps(caught.value.to_dict())


def test_a_second_run_waits_no_longer_than_it_may(
    start: Start, hold: Any, caplog: pytest.LogCaptureFixture
) -> None:
    """It logs the holder at once and again, gives up at its limit and names the process."""
    process = start()
    first_line(process)
    started = time.monotonic()
    with (
        caplog.at_level(logging.INFO, "qwen3ft.lock"),
        pytest.raises(EnvironmentNotReadyError) as caught,
        hold(wait=1, report_seconds=0.4),
    ):
        pass
    assert time.monotonic() - started >= 1
    assert caught.value.next_command == f"ps -fp {process.pid}"
    lines = [record.getMessage() for record in caplog.records]
    assert 2 <= len(lines) <= 3
    assert all(f"pid {process.pid}" in line and "run-a" in line for line in lines)


def test_a_killed_holder_frees_the_gpu_at_once(start: Start, hold: Any) -> None:
    """Also while one of its children lives on: workers do not inherit the lock."""
    process = start("child")
    child = int(first_line(process))
    try:
        process.kill()
        process.wait()
        os.kill(child, 0)  # it is still there
        with hold():
            pass
    finally:
        os.kill(child, signal.SIGKILL)


def test_a_waiting_run_starts_when_the_holder_is_killed(start: Start, hold: Any) -> None:
    """A waiting process gets the GPU after the kill, and not before."""
    process = start()
    first_line(process)
    killer = subprocess.Popen(["sh", "-c", f"sleep 1; kill -9 {process.pid}"])
    started = time.monotonic()
    with hold(wait=120):
        assert time.monotonic() - started > 0.8
    killer.wait()


def test_the_note_exists_while_the_gpu_is_held_and_only_its_owner_can_read_it(
    tmp_path: Path, hold: Any
) -> None:
    """Mode 0600, and emptied on release, also when the body fails."""
    path = tmp_path / f"{GPU}.lock"

    def hold_and_fail() -> None:
        with hold_gpu(GPU, "run-a", when_busy="refuse", wait_seconds=0, folder=tmp_path):
            assert stat.S_IMODE(path.stat().st_mode) == 0o600
            holder = read_holder(path)
            assert holder is not None
            assert (holder.pid, holder.run_id) == (os.getpid(), "run-a")
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        hold_and_fail()
    assert path.read_bytes() == b""
    with hold():
        pass


def test_other_gpus_and_the_cpu_are_free(start: Start, hold: Any) -> None:
    """One lock per GPU; slashes in an old name of a MIG slice do not end up in the file name."""
    first_line(start())
    for gpu in ("GPU-1", "MIG-GPU-1/2/0", CPU):
        with hold(gpu):
            pass


def test_a_lock_file_that_a_cleaner_deletes_is_made_anew(tmp_path: Path, hold: Any) -> None:
    """What is locked is the file at the path, not one that nobody else can see."""
    path = tmp_path / f"{GPU}.lock"
    with hold():
        pass
    path.unlink()
    with hold():
        holder = read_holder(path)
        assert holder is not None
        assert holder.run_id == "run-b"


def test_a_path_that_cannot_be_a_folder_is_an_error_with_a_command(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The path, the reason, and what to look at."""
    monkeypatch.setenv(gpu_lock.FOLDER_VARIABLE, str(tmp_path / "file" / "folder"))
    (tmp_path / "file").touch()
    with (
        pytest.raises(EnvironmentNotReadyError, match="Not a directory") as caught,
        hold_gpu(GPU, "run-a", when_busy="refuse", wait_seconds=0),
    ):
        pass
    assert caught.value.next_command == f"ls -ld {tmp_path / 'file'}"


def test_a_default_folder_of_someone_else_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """Anyone may make a folder in /tmp; one that is not this user's own is not trusted."""
    own, other = os.getuid(), 10_000_000 + os.getpid()
    monkeypatch.delenv(gpu_lock.FOLDER_VARIABLE, raising=False)
    monkeypatch.setattr(os, "getuid", lambda: other)
    try:
        with (
            pytest.raises(EnvironmentNotReadyError, match=f"belongs to user {own}"),
            hold_gpu(GPU, "run-a", when_busy="refuse", wait_seconds=0),
        ):
            pass
    finally:
        Path(f"/tmp/qwen3ft-locks-{other}").rmdir()


def test_the_default_folder_is_the_same_whatever_the_session(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """TMPDIR and XDG_RUNTIME_DIR differ between a login, a service and a job of one user."""
    gpu = f"GPU-test-{os.getpid()}"
    path = Path(f"/tmp/qwen3ft-locks-{os.getuid()}/{gpu}.lock")
    monkeypatch.delenv(gpu_lock.FOLDER_VARIABLE, raising=False)
    for variable in ("TMPDIR", "XDG_RUNTIME_DIR"):
        monkeypatch.setenv(variable, str(tmp_path))
    try:
        with hold_gpu(gpu, "run-a", when_busy="refuse", wait_seconds=0):
            assert read_holder(path) is not None
            assert stat.S_IMODE(path.parent.stat().st_mode) == 0o700
    finally:
        path.unlink(missing_ok=True)


def test_a_run_holds_its_gpu_and_on_a_cpu_only_what_it_asked_for(
    environment: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The GPU by its UUID; two runs on the CPU may overlap unless `lock_cpu` is set."""
    from flows.run_context import hold_devices

    monkeypatch.setenv(gpu_lock.FOLDER_VARIABLE, str(tmp_path / "locks"))
    gpu = GpuInfo(index=0, name="a", uuid=GPU, total_bytes=1, free_bytes=1, driver_version="580")
    with_gpu = environment.model_copy(update={"gpus": (gpu,)})
    first, second = RunDir(tmp_path / "run-1"), RunDir(tmp_path / "run-2")
    plain = TrainingConfig(when_gpu_is_busy="refuse")
    one_by_one = TrainingConfig(when_gpu_is_busy="refuse", lock_cpu=True)
    with hold_devices(plain, environment, first), hold_devices(plain, environment, second):
        assert not (tmp_path / "locks").exists()
    for config, machine in ((plain, with_gpu), (one_by_one, environment)):
        with (
            hold_devices(config, machine, first),
            pytest.raises(EnvironmentNotReadyError, match="Run run-1 "),
            hold_devices(config, machine, second),
        ):
            pass
    found = {path.name for path in (tmp_path / "locks").iterdir()}
    assert found == {f"{GPU}.lock", "cpu.lock", gpu_lock.CHOOSING}


@pytest.mark.parametrize("times", [3, pytest.param(50, marks=pytest.mark.slow)])
def test_twenty_processes_never_hold_a_gpu_together(tmp_path: Path, times: int) -> None:
    """Each increments a number in a file that only the lock guards: no increment is lost."""
    command = [sys.executable, "-c", textwrap.dedent(CONTEND), str(tmp_path), "20", str(times)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["0", str(20 * times)]
