"""A run makes its folders first, outlives the reader of its output, and misses its own folder."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from flows.run_context import commands_about, make_folders, open_run
from qwen3ft.config import TrainingConfig
from qwen3ft.errors import DivergedError, EnvironmentNotReadyError, SaveError
from qwen3ft.jobs.folders import RunDir
from qwen3ft.tracking.journal import Journal

PROGRAM = """
import sys, time
from pathlib import Path
from rich.console import Console
from flows.run_context import survive_closed_pipes
survive_closed_pipes()
print("ready", flush=True)
sys.stdin.readline()
time.sleep(0.3)
for console in (Console(), Console(stderr=True)):
    console.print("to nobody")
Path(sys.argv[1]).write_text("alive")
"""


def test_a_process_outlives_the_reader_of_its_output(tmp_path: Path) -> None:
    """Rich would end it; both streams are watched."""
    said = tmp_path / "said"
    command = [sys.executable, "-c", PROGRAM, str(said)]
    pipe = subprocess.PIPE
    process = subprocess.Popen(command, stdin=pipe, stdout=pipe, stderr=pipe)
    assert process.stdin is not None
    assert process.stdout is not None
    assert process.stderr is not None
    assert process.stdout.readline() == b"ready\n"
    process.stdout.close()
    process.stderr.close()
    process.stdin.close()
    assert process.wait(30) == 0
    assert said.read_text() == "alive"


@pytest.mark.parametrize("setting", ["runs_dir", "cache_dir"])
@pytest.mark.parametrize("folder", ["/proc/x", "/dev/null/x", "x" * 300, "file/x", "loop/x"])
def test_a_folder_that_cannot_be_made_ends_a_run_before_it_starts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, setting: str, folder: str
) -> None:
    """In a place without folders, below a file, of too long a name, in a circle of links."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").touch()
    (tmp_path / "loop").symlink_to("loop")
    folders = {"runs_dir": "runs", "cache_dir": "cache", setting: folder}
    with pytest.raises(EnvironmentNotReadyError, match=setting) as raised:
        make_folders(TrainingConfig(**folders))
    assert raised.value.next_command


def fail(config: Any, error: Exception, *, folder_is_gone: bool) -> None:
    """Open the run `run-1` and fail in it."""
    with open_run(config, "run-1", None) as run:
        if folder_is_gone:
            shutil.rmtree(run.path)
            Journal(run).tags({"a": 1})  # makes the folder anew
        raise error


@pytest.mark.parametrize(
    "error", [FileNotFoundError("no such file"), IndexError("no attempt"), KeyError("x")]
)
def test_a_run_whose_folder_was_deleted_says_so(
    make_config: Any, tmp_path: Path, error: Exception
) -> None:
    """Whatever was not found: also if something has made the folder anew meanwhile."""
    with pytest.raises(SaveError, match="run-1 was deleted or unmounted") as caught:
        fail(make_config(runs_dir=str(tmp_path)), error, folder_is_gone=True)
    assert caught.value.next_command == f"ls -ld {tmp_path}"
    assert caught.value.__cause__ is error


def test_a_failure_keeps_its_class(make_config: Any, tmp_path: Path) -> None:
    """A divergence stays one, and an error of ours with the folder in place stays what it is."""
    config = make_config(runs_dir=str(tmp_path))
    with pytest.raises(DivergedError):
        fail(config, DivergedError("no", why="no", next_command="no"), folder_is_gone=True)
    with pytest.raises(KeyError):
        fail(config, KeyError("x"), folder_is_gone=False)


def test_the_next_command_of_a_run_is_about_its_settings(tmp_path: Path) -> None:
    """Not about those that the project starts from."""
    run = RunDir(tmp_path / "my runs" / "1")
    error = EnvironmentNotReadyError("no", why="no", next_command="qwen3ft run --set gpus=1")
    with pytest.raises(EnvironmentNotReadyError) as raised, commands_about(run):
        raise error
    assert raised.value.next_command == f"qwen3ft run --set gpus=1 --config '{run.config}'"


@pytest.mark.parametrize(
    ("printed", "shown"),
    [
        ("qwen3ft run --set gpus=1", "qwen3ft run --resume 1 --set gpus=1"),
        ("qwen3ft run --set ability_path=null", "qwen3ft run --set ability_path=null --config "),
        ("qwen3ft plan --set max_memory_gb=5", "qwen3ft plan --set max_memory_gb=5 --config "),
    ],
)
def test_a_resumed_run_that_is_refused_is_resumed_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, printed: str, shown: str
) -> None:
    """With the change, if it may make it: a new run would leave the checkpoints behind."""
    monkeypatch.chdir(tmp_path)
    run = RunDir(tmp_path / "runs" / "1")
    run.attempt(1).path.mkdir(parents=True)
    with pytest.raises(EnvironmentNotReadyError) as raised, commands_about(run):
        raise EnvironmentNotReadyError("no", why="no", next_command=printed)
    about = str(run.config) if shown.endswith("--config ") else ""
    assert raised.value.next_command == f"{shown}{about}"
