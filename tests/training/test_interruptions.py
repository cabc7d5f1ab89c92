"""Wherever a training is interrupted, it ends as an undisturbed one.

The short form of the campaign `benchmarks.kills`: real workers, interrupted at chosen points.
"""

from __future__ import annotations

import signal
import subprocess
from collections.abc import Callable
from contextlib import suppress
from functools import cache
from pathlib import Path
from typing import Any

import pytest
from support.warm_workers import RECORD_SYNCS

from benchmarks.kills.power import drop_unsynced
from benchmarks.kills.strikes import POINTS
from benchmarks.kills.trainings import (
    PATHS,
    SCHEDULE,
    Result,
    next_attempt,
    read_failure,
    read_result,
    train_undisturbed,
)
from qwen3ft.faults import VARIABLE
from qwen3ft.jobs.folders import JobDir, RunDir
from qwen3ft.jobs.processes import end_process_tree, start_worker
from qwen3ft.training import checkpoint

KILLED = -signal.SIGKILL
ASKED = 128 + signal.SIGTERM

EARLY_POINTS = (
    *("step.done", "evaluation.begun:hit=4", "evaluation.logged", "evaluation.marked"),
    *("folder.filled", "file.written", "file.synced", "file.renamed", "folder.listed"),
)
"""Points before the first checkpoint has its name: killed there, a run starts again."""

LATE_POINTS = ("folder.renamed", "checkpoint.committed", "checkpoint.pruned", "training.over")
"""Points after a further checkpoint has its name: killed at each in turn, a run ends."""


class Workers:
    """Starts one worker at a time, as `benchmarks.kills.trainings.Nursery` does."""

    def __init__(self) -> None:
        self._worker: subprocess.Popen[bytes] | None = None

    def start(self, job: Path, faults: str = "", power: Path | None = None) -> int:
        """Start the worker of the job; `power` is a folder in which to record what it syncs."""
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv(VARIABLE, faults)
            patch.setenv(RECORD_SYNCS, str(power or ""))
            self._worker = start_worker("train", JobDir(job))
        return self._worker.pid

    def wait(self, seconds: float) -> int | None:
        """Return the worker's exit status; None if it has not ended within `seconds`."""
        assert self._worker is not None
        with suppress(subprocess.TimeoutExpired):
            return self._worker.wait(seconds)
        end_process_tree(self._worker)
        return None


@pytest.fixture(scope="module")
def plan_of(plan_in: Any, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Any]:
    """Return a function that plans a training of a path of the campaign."""
    folder = tmp_path_factory.mktemp("interruptions")

    def plan(path: str) -> Any:
        changes = dict(PATHS[path])
        dropout = changes.pop("lora_dropout", 0.0)
        return plan_in(folder, path, dropout, **{**SCHEDULE, "keep_checkpoints": 2, **changes})

    return plan


@pytest.fixture(scope="module")
def undisturbed(plan_of: Any, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Result]:
    """Return a function that gives the result of an undisturbed training of a path."""

    @cache
    def train(path: str) -> Result:
        run = RunDir(tmp_path_factory.mktemp("undisturbed") / "run")
        return train_undisturbed(Workers(), plan_of(path), run)[0]

    return train


@pytest.fixture
def attempt(plan_of: Any, tmp_path: Path) -> Callable[..., int]:
    """Return a function that makes the next attempt of a run in the test's folder."""

    def make(path: str, faults: str = "", power: Path | None = None) -> int:
        run = RunDir(tmp_path / "run")
        plan = next_attempt(plan_of(path), run)
        workers = Workers()
        workers.start(run.attempt(plan.attempt).create(plan).path, faults, power)
        status = workers.wait(120)
        assert status is not None, f"{faults} left a worker that is stuck"
        return status

    return make


def saved_steps(run: RunDir) -> list[int]:
    """Return the steps of all checkpoints of the run."""
    return [one.step for one in checkpoint.list_checkpoints(j.checkpoints for j in run.attempts())]


def test_killed_at_each_point_in_turn_a_training_ends_bit_identical(
    attempt: Any, undisturbed: Any, tmp_path: Path
) -> None:
    """One run, killed 13 times: every adapter and optimizer bit, and each metric once."""
    path, run = "packed, dropout", RunDir(tmp_path / "run")
    assert {point.partition(":")[0] for point in (*EARLY_POINTS, *LATE_POINTS)} == set(POINTS)
    for point in EARLY_POINTS:
        assert attempt(path, f"kill@point={point}") == KILLED, point
        assert saved_steps(run) == [], point
    for point in LATE_POINTS:
        before = len(saved_steps(run))
        assert attempt(path, f"kill@point={point}") == KILLED, point
        assert len(saved_steps(run)) > before, point
    assert attempt(path) == 0
    assert read_result(run).differences(undisturbed(path)) == []


def test_a_stop_request_never_costs_an_evaluation(
    attempt: Any, undisturbed: Any, tmp_path: Path
) -> None:
    """Asked to stop at an evaluation's step, twice in a row and at the last step."""
    path, run = "packed, dropout", RunDir(tmp_path / "run")
    last = SCHEDULE["total_steps"]
    assert attempt(path, "term@step=3") == ASKED
    assert attempt(path, "term@point=evaluation.begun") == ASKED  # of the one that is made up
    assert attempt(path, "kill@point=evaluation.marked") == KILLED
    assert attempt(path, "term@point=evaluation.begun:hit=5") == ASKED  # of a later one
    assert attempt(path, f"term@step={last}:attempt=5") == ASKED
    assert max(saved_steps(run)) == last
    assert read_failure(run, 5, ASKED).kind == "PreemptedError"
    assert attempt(path) == 0
    assert read_result(run).differences(undisturbed(path)) == []


def test_a_training_that_was_over_is_not_trained_further(
    attempt: Any, undisturbed: Any, tmp_path: Path
) -> None:
    """Killed between its last checkpoint and its outcome, after it had stopped early."""
    path, run = "stopped early", RunDir(tmp_path / "run")
    expected = undisturbed(path)
    assert expected.outcome["stopped_early"], expected.losses
    assert expected.outcome["last_step"] < SCHEDULE["total_steps"]
    assert attempt(path, "kill@point=training.over") == KILLED
    assert attempt(path) == 0
    assert read_result(run).differences(expected) == []


def test_a_power_cut_costs_nothing_that_was_committed(
    attempt: Any, undisturbed: Any, tmp_path: Path
) -> None:
    """The checkpoint is there once its commit has returned, and no metric before it is missing."""
    path, run = "packed, dropout", RunDir(tmp_path / "run")
    for number, (point, saved) in enumerate(
        {"folder.renamed": [], "checkpoint.committed": [3]}.items()
    ):
        power = tmp_path / f"power-{number}"
        power.mkdir()
        assert attempt(path, f"kill@point={point}", power) == KILLED
        drop_unsynced(run.path, power)
        assert saved_steps(run) == saved
    assert attempt(path) == 0
    assert read_result(run).differences(undisturbed(path)) == []
