"""The process boundary: real workers that run out of memory, crash, hang or are cancelled."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import pytest

from qwen3ft import faults
from qwen3ft.config import TrainingConfig
from qwen3ft.errors import (
    ConfigError,
    DivergedError,
    OutOfMemoryError,
    PreemptedError,
    SaveError,
    StalledError,
    WorkerCrashedError,
)
from qwen3ft.jobs.failures import folder_gone
from qwen3ft.jobs.folders import JobDir, RunDir
from qwen3ft.jobs.launcher import run_worker
from qwen3ft.jobs.processes import PREEMPTED_STATUS
from qwen3ft.records.plan import TrainPlan
from qwen3ft.records.training import AttemptOutcome, Failure
from qwen3ft.recovery.adjust import FailedAttempt, GiveUp
from qwen3ft.training import checkpoint
from tasks.adjust import adjust_parameters

SCHEDULE = {"total_steps": 6, "evaluate_every_steps": 2}


@pytest.fixture
def attempt(monkeypatch: pytest.MonkeyPatch, make_plan: Any) -> Callable[..., AttemptOutcome]:
    """Return a function that runs one training attempt in a worker, with planted faults."""

    def run(fault: str = "", **changes: Any) -> AttemptOutcome:
        monkeypatch.setenv(faults.VARIABLE, fault)
        plan: TrainPlan = make_plan(**{**SCHEDULE, **changes})
        job = RunDir(Path(plan.run_dir)).attempt(plan.attempt).create(plan)
        return run_worker("train", job, AttemptOutcome, stall_seconds=plan.stall_seconds)

    return run


@pytest.mark.parametrize(
    ("fault", "expected"),
    [
        # Out of memory and a kill are in tests/flows/test_flow.py too; what an exit means is read
        # from the log, by rules that tests/jobs/test_failures.py tests.
        pytest.param("exit@step=4", OutOfMemoryError, marks=pytest.mark.slow),
        pytest.param("oom@step=4", OutOfMemoryError, marks=pytest.mark.slow),
        pytest.param("kill@step=4", WorkerCrashedError, marks=pytest.mark.slow),
        pytest.param("nan@step=4", DivergedError, marks=pytest.mark.slow),
        pytest.param("term@step=4", PreemptedError, marks=pytest.mark.slow),
        pytest.param("error@step=4", WorkerCrashedError, marks=pytest.mark.slow),
    ],
)
def test_a_fault_in_the_worker_becomes_its_classified_error(
    attempt: Any, tmp_path: Path, fault: str, expected: type[Exception]
) -> None:
    """Whatever ends the worker, the flow's side sees the right error and the last checkpoint."""
    with pytest.raises(expected) as caught:
        attempt(fault)
    assert type(caught.value) is expected
    # Recovery tells training from evaluation by this; step 4 comes after an evaluation.
    assert caught.value.facts.get("phase", "train") == "train"
    job = RunDir(tmp_path / "run").attempt(1)
    assert job.read_failure() == Failure.from_error(caught.value)  # also of one that was killed
    newest = checkpoint.newest_verified([job.checkpoints])
    assert newest is not None
    # SIGTERM saves where it stops; everything else goes back to the last evaluation.
    assert newest.step == (4 if fault.startswith("term") else 2)
    assert not job.outcome.exists()


def test_a_signal_that_a_library_turns_into_its_own_error_is_still_one(tmp_path: Path) -> None:
    """Loading a model wraps whatever is raised in it; the attempt was asked to stop, no more."""
    job = JobDir(tmp_path / "job")
    job.path.mkdir()
    program = """
import os, signal, sys
from pathlib import Path
from qwen3ft.worker import __main__ as worker

def load(job):
    job.heartbeat.beat("load")
    try:
        os.kill(os.getpid(), signal.SIGTERM)
        sum(range(10**6))
    except Exception:
        raise RuntimeError("some issues during automatic conversion of the weights") from None

worker.KINDS["quantize"], worker.import_libraries = load, lambda kind: None
sys.exit(worker._run_job("quantize", Path(sys.argv[1])))
"""
    done = subprocess.run([sys.executable, "-c", program, str(job.path)], check=False)
    assert done.returncode == PREEMPTED_STATUS
    failure = Failure.model_validate_json(job.failure.read_text())
    assert failure.kind == "PreemptedError"


@pytest.mark.slow
def test_a_silent_worker_is_ended_and_named_stalled(
    attempt: Any, tmp_path: Path, cold_workers: None
) -> None:
    """A worker without progress is killed within seconds of its limit, with its children."""
    with pytest.raises(StalledError, match="no sign of life"):
        attempt("hang@step=2", stall_seconds=12.0)
    failure = RunDir(tmp_path / "run").attempt(1).read_failure()
    assert failure is not None
    assert failure.kind == "StalledError"
    children = psutil.Process().children(recursive=True)
    assert not [child for child in children if "qwen3ft.worker" in _command(child)]


def test_a_run_folder_that_is_deleted_ends_the_attempt_at_once(
    attempt: Any, make_plan: Any, tmp_path: Path
) -> None:
    """The error names the folder and no attempt is made again: nothing could be resumed."""
    run = tmp_path / "run"

    def delete_in_training() -> None:
        _wait_for(lambda: (run / "attempts/01/metrics.jsonl").exists(), 120)
        while run.exists():
            shutil.rmtree(run, ignore_errors=True)  # the worker is writing into it

    thread = threading.Thread(target=delete_in_training)
    thread.start()
    with pytest.raises(SaveError, match="attempts/01 was deleted or unmounted"):
        attempt(total_steps=10_000, evaluate_every_steps=5_000)
    thread.join()
    failure = Failure.from_error(folder_gone(run))
    decision = adjust_parameters.fn(TrainingConfig(), [FailedAttempt(make_plan(), failure)])
    assert isinstance(decision, GiveUp)


@pytest.mark.slow  # of a worker that waits: in tests/jobs/test_job_processes.py
def test_a_worker_dies_with_its_parent(tmp_path: Path, make_plan: Any) -> None:
    """SIGKILL of the launching process leaves no worker behind, whatever it is doing."""
    plan = make_plan(total_steps=10_000, evaluate_every_steps=5_000)
    job = RunDir(Path(plan.run_dir)).attempt(1).create(plan)
    program = (
        "import sys; from pathlib import Path; from qwen3ft.jobs.folders import JobDir;"
        "from qwen3ft.jobs.launcher import run_worker;"
        "from qwen3ft.records.training import AttemptOutcome;"
        "run_worker('train', JobDir(Path(sys.argv[1])), AttemptOutcome, stall_seconds=600)"
    )
    parent = subprocess.Popen([sys.executable, "-c", program, str(job.path)])
    try:
        _wait_for(lambda: job.metrics.exists(), 60)
        (worker,) = psutil.Process(parent.pid).children()
        parent.kill()
        _wait_for(lambda: not worker.is_running() or worker.status() == "zombie", 5)
    finally:
        parent.kill()
        parent.wait()


def test_ending_the_parent_orderly_ends_the_worker_within_ten_seconds(
    tmp_path: Path, make_plan: Any
) -> None:
    """A cancelled flow run gets SIGTERM: its worker saves a checkpoint, both are gone in 10 s."""
    plan = make_plan(total_steps=10_000, evaluate_every_steps=5_000)
    job = RunDir(Path(plan.run_dir)).attempt(1).create(plan)
    program = (
        "import signal, sys; from pathlib import Path; from qwen3ft.jobs.folders import JobDir;"
        "from qwen3ft.jobs.launcher import run_worker;"
        "from qwen3ft.records.training import AttemptOutcome;"
        "signal.signal(signal.SIGTERM, lambda *_: sys.exit(143));"
        "run_worker('train', JobDir(Path(sys.argv[1])), AttemptOutcome, stall_seconds=600)"
    )
    parent = subprocess.Popen([sys.executable, "-c", program, str(job.path)])
    try:
        _wait_for(lambda: job.metrics.exists() and job.metrics.stat().st_size > 2000, 60)
        (worker,) = psutil.Process(parent.pid).children()
        started = time.monotonic()
        parent.send_signal(signal.SIGTERM)
        parent.wait(10)
        assert time.monotonic() - started < 10
        assert not worker.is_running()
    finally:
        parent.kill()
        parent.wait()
    assert checkpoint.newest_verified([job.checkpoints]) is not None


@pytest.mark.slow
def test_a_run_killed_at_a_random_step_ends_bit_identical(
    attempt: Any, make_plan: Any, tmp_path: Path
) -> None:
    """SIGKILL, resume from what the disk holds: the adapter file equals the undisturbed one's.

    That one left every step and evaluation as a line, and a checkpoint that verifies.
    """
    from random import Random

    from qwen3ft.disk.files import sha256_file

    step = Random(os.urandom(8)).randint(3, 6)
    undisturbed = attempt()
    _check_what_it_left(undisturbed, RunDir(tmp_path / "run").attempt(1))
    reference = sha256_file(Path(undisturbed.best_checkpoint) / "adapter_model.safetensors")
    with pytest.raises(WorkerCrashedError):
        attempt(f"kill@step={step}", run_dir=str(tmp_path / "killed"))
    run = RunDir(tmp_path / "killed")
    newest = checkpoint.newest_verified([job.checkpoints for job in run.attempts()])
    assert newest is not None, f"killed at step {step}"
    resumed = attempt(run_dir=str(run.path), attempt=2, resume_from=str(newest.path))
    result = sha256_file(Path(resumed.best_checkpoint) / "adapter_model.safetensors")
    assert result == reference, f"killed at step {step}, resumed from {newest.step}"
    assert resumed.best_held_out_loss == undisturbed.best_held_out_loss


def _check_what_it_left(outcome: AttemptOutcome, job: JobDir) -> None:
    lines = [json.loads(line) for line in job.metrics.read_text().splitlines()]
    assert [line["step"] for line in lines if line["loss"] is not None] == [1, 2, 3, 4, 5, 6]
    assert [line["step"] for line in lines if line["held_out_loss"] is not None] == [0, 2, 4, 6]
    assert all(line["memory_usage"]["allocated_gb"] > 0 for line in lines)
    assert len(job.memory.read_text().splitlines()) == len(lines)
    assert checkpoint.find_damage(Path(outcome.best_checkpoint)) is None
    assert outcome.tokens_per_second > 0
    assert 0 < outcome.peak_memory_gb < 4


def test_faults_that_are_not_understood_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """A typo in the variable is an error, not a campaign without faults."""
    monkeypatch.setenv(faults.VARIABLE, "ooom@step=1")
    with pytest.raises(ConfigError, match="ooom"):
        faults.planted_faults()


def _command(process: psutil.Process) -> str:
    try:
        return " ".join(process.cmdline())
    except psutil.NoSuchProcess:
        return ""


def _wait_for(condition: Callable[[], bool], seconds: float) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, f"not within {seconds} s"
        time.sleep(0.05)
