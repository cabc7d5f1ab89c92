"""A run that fails, is continued by its id, and is judged; its inputs have keys in all places."""

from __future__ import annotations

import json
import os
import shutil
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from support.flow_project import FlowProject
from support.judge_server import Handler, prefers, serving
from support.planted_keys import make_inputs

from qwen3ft.jobs.folders import RunDir
from qwen3ft.machine import gpu_lock
from qwen3ft.model.hub import resolve_model
from qwen3ft.model.manager import read_snapshot, snapshot_target
from qwen3ft.records.model import ModelSnapshot


class Resumed(NamedTuple):
    """The starts of the run: their final states, its folder, and what it left after the first."""

    failed: Any
    failed_card: dict[str, Any]
    failed_page: str
    """Card of the failed run, in markdown."""
    snapshot_after_failure: ModelSnapshot | None
    """Snapshot that was damaged before the first start."""
    refused: Any
    """Final state of a start with another seed."""
    ended: Any
    run: RunDir
    run_of_second_start: RunDir
    printed: str
    """Everything that both starts wrote to the terminal."""


@contextmanager
def _printed_to(path: Path) -> Iterator[None]:
    """Write to a file what this process and those that it starts print."""
    sys.stdout.flush()
    sys.stderr.flush()
    kept = [(number, os.dup(number)) for number in (1, 2)]
    with path.open("w", encoding="utf-8", buffering=1) as log:
        try:
            for number, _ in kept:
                os.dup2(log.fileno(), number)
            with redirect_stdout(log), redirect_stderr(log):
                yield
        finally:
            for number, copy in kept:
                os.dup2(copy, number)
                os.close(copy)


def fail_and_resume(project: FlowProject, snapshot: ModelSnapshot, folder: Path) -> Resumed:
    """Run the flow with one attempt, which is killed, and continue the run.

    Before that the snapshot of its model is damaged; while its answers are judged, another run
    takes the machine.

    Args:
        project: A project with servers that are up.
        snapshot: The quantised model.
        folder: Folder for what belongs to no run.
    """
    cache = project.root / "cache"  # of its own: others load the shared snapshot meanwhile
    config = project.config(cache_dir=str(cache))
    target = snapshot_target(config, resolve_model(config), "cpu")
    shutil.copytree(snapshot.path, target)
    (target / "config.json").write_text("{}")
    assert read_snapshot(target) is None
    one = threading.Lock()

    def judge(handler: Handler) -> None:
        with one, gpu_lock.hold_gpu(gpu_lock.CPU, "other", when_busy="refuse", wait_seconds=0):
            prefers("candidate")(handler)

    with (
        serving(judge) as server,
        pytest.MonkeyPatch.context() as patch,
        _printed_to(folder / "printed.log"),
    ):
        patch.setenv(gpu_lock.FOLDER_VARIABLE, str(folder))
        settings: dict[str, Any] = {
            **make_inputs(project.root / "inputs"),
            "seed": 41,
            "num_epochs": 2,  # six steps
            "max_attempts": 1,
            "lock_cpu": True,
            "cache_dir": str(cache),
            "judge_url": server.url,
            "judge_model": "j",
            "judge_rows": 4,
            "max_sequence_length": 512,
            "inference_rows": 60,
            "max_new_tokens": 4,
            "gate_min_rows": 1_000,  # others count on the version in use
        }
        failed, run = project.run("kill@step=5", **settings)
        failed_card = json.loads((run.path / "card.json").read_text())
        failed_page = (run.path / "card.md").read_text()
        made_anew = read_snapshot(target)
        own = run.config.read_bytes()
        refused, _ = project.run(continue_run=run.path.name, seed=42)
        assert run.config.read_bytes() == own
        ended, again = project.run(continue_run=run.path.name, keep_checkpoints=3)
    printed = (folder / "printed.log").read_text(encoding="utf-8")
    return Resumed(failed, failed_card, failed_page, made_anew, refused, ended, run, again, printed)
