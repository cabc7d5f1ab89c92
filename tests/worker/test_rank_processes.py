"""Ranks in processes of their own: one that fails ends all, and its failure counts."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from safetensors.torch import load_file

from qwen3ft import faults
from qwen3ft.errors import (
    OutOfMemoryError,
    PreemptedError,
    RanksPartedError,
    StalledError,
    WorkerCrashedError,
)
from qwen3ft.jobs.folders import JobDir, RunDir, write_record
from qwen3ft.jobs.launcher import try_worker
from qwen3ft.jobs.processes import HELD_VARIABLE, end_process_tree, start_worker
from qwen3ft.machine.gpu_choice import VISIBLE
from qwen3ft.model.adapter_checks import ADAPTER_FILE
from qwen3ft.records.plan import TrainPlan
from qwen3ft.records.training import AttemptOutcome, Failure
from qwen3ft.recovery.adjust import FailedAttempt, Retry
from qwen3ft.worker import bootstrap
from qwen3ft.worker.agent import first_failure
from tasks.adjust import adjust_parameters

LOOPBACK = {"127.0.0.1", "::1"}
SCHEDULE = {"total_steps": 6, "evaluate_every_steps": 2}


@pytest.fixture
def folders(tmp_path: Path) -> list[JobDir]:
    """Folders of three ranks that were training."""
    made = [JobDir(tmp_path).rank(rank) for rank in range(3)]
    for folder in made:
        folder.path.mkdir(parents=True)
        folder.heartbeat.write_text('{"phase": "train", "step": 4}')
    return made


def left(folder: JobDir, error: Any) -> None:
    write_record(folder.failure, Failure.from_error(error))


def test_the_failure_of_the_first_rank_is_the_one_that_counts(folders: list[JobDir]) -> None:
    """Not what it causes in the others, whichever of them the agent saw first."""
    left(folders[0], RanksPartedError("The connection to the other ranks broke."))
    left(folders[1], OutOfMemoryError("GPU memory ran out.", domain="gpu", phase="train"))
    left(folders[2], PreemptedError("The worker was asked to stop (SIGTERM)."))
    error = first_failure(folders, {0: 1, 2: 143, 1: 1})
    assert isinstance(error, OutOfMemoryError)
    assert error.what == "Rank 1 of 3: GPU memory ran out."
    assert error.facts == {"domain": "gpu", "phase": "train", "rank": 1, "ranks": 3}


def test_a_rank_that_was_killed_left_nothing_and_is_found_all_the_same(
    folders: list[JobDir],
) -> None:
    """By its exit status, beside one that lost the connection and one that the agent ended."""
    left(folders[0], RanksPartedError("The connection to the other ranks broke."))
    error = first_failure(folders, {2: -9, 0: 1, 1: -15})
    assert isinstance(error, WorkerCrashedError)
    assert error.what.startswith("Rank 2 of 3: The worker was killed by SIGKILL")
    assert error.facts["phase"] == "train"


def test_where_all_lost_each_other_that_is_the_failure(folders: list[JobDir]) -> None:
    for folder in folders:
        left(folder, RanksPartedError("The connection to the other ranks broke."))
    assert isinstance(first_failure(folders, {1: 1, 0: 1, 2: 1}), RanksPartedError)


Attempt = Callable[..., Any]


@pytest.fixture
def attempt(monkeypatch: pytest.MonkeyPatch, make_plan: Any, tmp_path: Path) -> Attempt:
    """Return a function that runs an attempt of a plan on some ranks; it adds the time it took."""

    def run(fault: str = "", plan: TrainPlan | None = None, **changes: Any) -> Any:
        monkeypatch.setenv(faults.VARIABLE, fault)
        plan = plan or make_plan(**{**SCHEDULE, "packing": True, **changes})
        job = RunDir(Path(plan.run_dir)).attempt(plan.attempt).create(plan)
        return plan, try_worker(
            plan.worker_kind, job, AttemptOutcome, stall_seconds=plan.stall_seconds
        )

    return run


def adapter_of(outcome: AttemptOutcome) -> torch.Tensor:
    tensors = load_file(Path(outcome.best_checkpoint) / ADAPTER_FILE)
    return torch.cat([tensors[name].flatten() for name in sorted(tensors)])


def processes_of(folder: Path) -> list[psutil.Process]:
    """Return those that were started with the folder."""
    found = psutil.process_iter(["cmdline"])
    return [process for process in found if str(folder) in (process.info["cmdline"] or ())]


@pytest.mark.slow
def test_a_rank_that_is_gone_for_good_leaves_a_run_that_ends_on_the_rest(
    attempt: Attempt, make_config: Any, make_plan: Any, tmp_path: Path
) -> None:
    """Killed, again, and left out: the adapter is that of one process within 1e-5."""
    _, expected = attempt()
    fault = "kill@step=3:rank=1,kill@step=5:attempt=2:rank=1"
    plan = make_plan("lost", **SCHEDULE, packing=True, places=(0, 1))
    failed: list[FailedAttempt] = []
    while True:
        plan, result = attempt(fault, plan)
        if isinstance(result, AttemptOutcome):
            break
        assert result.kind == "WorkerCrashedError"
        assert result.what.startswith("Rank 1 of 2: ")
        failed.append(FailedAttempt(plan, result))
        decision = adjust_parameters.fn(make_config(), failed)
        assert isinstance(decision, Retry)
        plan = decision.plan
    assert [each.plan.places for each in failed] == [(0, 1), (0, 1)]
    assert (plan.attempt, plan.places) == (3, (0,))
    assert "1 of 2 ranks go on" in plan.reasons["places"]
    found, wanted = adapter_of(result), adapter_of(expected)
    assert float((found - wanted).norm() / wanted.norm()) <= 1e-5


@pytest.mark.slow
@pytest.mark.parametrize(
    ("fault", "kind"),
    [
        ("oom@step=4:rank=1", "OutOfMemoryError"),
        ("kill@step=4:rank=0", "WorkerCrashedError"),
        ("error@step=4:rank=1", "WorkerCrashedError"),
        ("nan@step=4:rank=1", "DivergedError"),
        ("term@step=4:rank=1", "PreemptedError"),
        # The other one obeys no signal, as if it waited in a kernel: torch would wait for 30 s.
        ("kill@step=4:rank=0,stop@step=4:rank=1", "WorkerCrashedError"),
    ],
)
def test_a_fault_in_a_rank_is_the_failure_of_the_attempt(
    attempt: Attempt, tmp_path: Path, fault: str, kind: str
) -> None:
    """Within 10 s of it all ranks are gone, and nothing hangs on."""
    _, failure = attempt(fault, places=(0, 1))
    assert failure.kind == kind
    job = RunDir(tmp_path / "run").attempt(1)
    failed = job.rank(failure.facts["rank"])
    began = failed.failure if failed.failure.exists() else failed.heartbeat
    assert job.failure.stat().st_mtime - began.stat().st_mtime < 10
    assert processes_of(job.path) == []


@pytest.mark.slow
def test_a_rank_that_hangs_is_a_stall_which_names_it(attempt: Attempt, tmp_path: Path) -> None:
    """Also stopped in the middle of a collective, where it obeys no request."""
    _, failure = attempt("stop@step=4:rank=1", places=(0, 1), stall_seconds=60.0)
    assert failure.kind == StalledError.__name__
    assert failure.what.startswith("Rank 1 gave no sign of life for 60 s")
    assert processes_of(RunDir(tmp_path / "run").attempt(1).path) == []


@pytest.mark.slow
def test_a_cancelled_attempt_frees_all_ranks_with_a_checkpoint(
    make_plan: Any, tmp_path: Path
) -> None:
    """Within 10 s, and the next attempt goes on from there."""
    plan = make_plan(total_steps=10_000, evaluate_every_steps=5000, places=(0, 1))
    plan = plan.with_settings(num_epochs=10_000)
    job = RunDir(Path(plan.run_dir)).attempt(1).create(plan)
    process = start_worker("ranks", job)
    end = time.monotonic() + 240
    while not job.metrics.exists() and time.monotonic() < end:
        time.sleep(0.5)
    assert job.metrics.exists()
    # The other users of the machine and the network can reach no rank and no agent.
    sockets = [each for one in processes_of(job.path) for each in one.net_connections("inet")]
    assert {each.laddr.ip for each in sockets if each.status == psutil.CONN_LISTEN} <= LOOPBACK
    started = time.monotonic()
    end_process_tree(process)
    assert time.monotonic() - started < 10
    assert processes_of(job.path) == []
    assert any(job.checkpoints.iterdir())


@pytest.mark.parametrize(
    ("held", "per_host", "seen"),
    [
        ("", None, ["0", "2"]),
        ("GPU-a,GPU-b,GPU-c", None, ["GPU-a", "GPU-c"]),
        ("GPU-a,GPU-b", 2, ["GPU-a", "GPU-a"]),  # on two hosts
    ],
)
def test_each_rank_sees_the_gpu_of_its_place_alone(
    make_plan: Any,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    held: str,
    per_host: int | None,
    seen: list[str],
) -> None:
    """And nothing of torch's agent, from which transformers would distribute the model."""
    monkeypatch.setattr(bootstrap, "_print_to", lambda path: None)
    plan = make_plan(device="cuda", places=(0, 2), places_per_host=per_host)
    for rank, gpu in enumerate(seen):
        JobDir(tmp_path).rank(rank).create(plan)
        given = {
            "RANK": str(rank),
            "LOCAL_RANK": "1",
            "WORLD_SIZE": "2",
            "TORCHELASTIC_RUN_ID": "x",
        }
        for name, value in {**given, HELD_VARIABLE: held, VISIBLE: "0"}.items():
            monkeypatch.setenv(name, value)
        assert bootstrap.enter_rank(tmp_path) == JobDir(tmp_path).rank(rank).path
        assert os.environ[VISIBLE] == gpu
        assert not given.keys() & os.environ.keys()
