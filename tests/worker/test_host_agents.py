"""Agents of several hosts in one attempt: they start together, and one that is gone is missed."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from safetensors.torch import load_file
from support.plans import plan_for

from qwen3ft import faults
from qwen3ft.errors import OutOfMemoryError, RanksPartedError, WorkerCrashedError
from qwen3ft.jobs.folders import JobDir, RunDir, write_record
from qwen3ft.jobs.launcher import try_worker
from qwen3ft.jobs.processes import end_process_tree, start_worker
from qwen3ft.model.adapter_checks import ADAPTER_FILE
from qwen3ft.records.plan import TrainPlan
from qwen3ft.records.training import AttemptOutcome, Failure, RankOutcome
from qwen3ft.recovery.adjust import FailedAttempt, GiveUp, Retry, decide_retry
from qwen3ft.worker import hosts as hosts_module
from qwen3ft.worker.agent import first_failure
from qwen3ft.worker.hosts import Agent, OtherHosts

ON_TWO = {"places": (0, 1, 2, 3), "places_per_host": 2}
SCHEDULE = {"total_steps": 6, "evaluate_every_steps": 2, "packing": True}


def test_the_cause_on_another_host_counts_and_not_what_it_causes_here(tmp_path: Path) -> None:
    """Another host is asked only where no rank of this one has a cause of its own."""
    folders = [JobDir(tmp_path).rank(rank) for rank in range(2)]
    for folder in folders:
        folder.path.mkdir(parents=True)
    parted = Failure.from_error(RanksPartedError("The connection to the other ranks broke."))
    write_record(folders[0].failure, parted)
    full = OutOfMemoryError("Rank 1 of 2: GPU memory ran out.", rank=1, ranks=2)
    error = first_failure(folders, {0: 1}, 0, lambda: [Failure.from_error(full)])
    assert (type(error), error.what, error.facts["rank"]) == (OutOfMemoryError, full.what, 1)
    assert isinstance(first_failure(folders, {0: 1}, 0, tuple), RanksPartedError)
    write_record(folders[0].failure, Failure.from_error(OutOfMemoryError("Memory ran out.")))
    assert first_failure(folders, {0: 1}, 0, pytest.fail).what == "Rank 0 of 2: Memory ran out."


def test_a_silent_host_counts_as_gone_and_one_that_is_there_does_not(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """By changes alone: no clock of another host is read."""
    monkeypatch.setattr(hosts_module, "HOST_SILENT_SECONDS", 0.2)
    monkeypatch.setattr(hosts_module, "FIRST_SIGN_SECONDS", 0.6)
    attempt, ranks = JobDir(tmp_path), {0: (0, 1), 1: (2, 3)}
    attempt.host(1).path.mkdir(parents=True)
    here, there = (OtherHosts(Agent(attempt, host, ranks)) for host in ranks)
    for _ in range(4):
        assert not here.failures()
        assert not there.failures()
        time.sleep(0.1)
    [gone] = here.last_words()
    assert gone.facts["lost_host"] == 1
    assert gone.what.startswith(f"Host 1 ({hosts_module.socket.gethostname()}) gave no sign")
    late = OtherHosts(Agent(JobDir(tmp_path / "late"), 0, ranks))
    (tmp_path / "late").mkdir()
    assert not late.failures()
    time.sleep(0.7)
    assert "which never began" in late.failures()[0].what


def test_a_time_in_which_this_host_stood_still_is_no_silence_of_another(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """The project folder was blocked for 40 s, say; only what follows is counted."""
    now = [0.0]
    monkeypatch.setattr(hosts_module, "time", SimpleNamespace(monotonic=lambda: now[0]))
    here = OtherHosts(Agent(JobDir(tmp_path), 0, {0: (0,), 1: (1,)}))
    folder = JobDir(tmp_path).host(1)
    folder.path.mkdir(parents=True)
    folder.alive.write_text("b 1", encoding="utf-8")
    found = []
    for after in (0.5, 40.0, *[1.0] * 31):
        now[0] += after
        found.append([failure.what for failure in here.failures()])
    assert found[:-1] == [[]] * 32
    assert found[-1] == ["Host 1 (b) gave no sign of life for 31 s."]


def test_the_next_attempt_goes_on_without_a_host_that_is_gone() -> None:
    """All of its places at once; the effective batch stays, and the plan says why."""
    plan = plan_for().with_settings(**ON_TWO)
    lost = WorkerCrashedError("Host 1 (b) gave no sign of life for 30 s.", lost_host=1)
    decision = decide_retry(
        [FailedAttempt(plan, Failure.from_error(lost))],
        max_attempts=5,
        allow_degraded=False,
        newest_checkpoint=None,
    )
    assert isinstance(decision, Retry)
    assert (decision.plan.places, decision.plan.hosts) == ((0, 1), (0,))
    assert decision.plan.effective_batch_size == plan.effective_batch_size
    assert "2 of 4 ranks go on, without place 2, 3" in decision.plan.reasons["places"]


def test_a_run_keeps_its_own_host_when_the_others_have_lost_it() -> None:
    """It was cut off for a while: once more on all, and the second time the run ends."""
    plan = plan_for().with_settings(**ON_TWO)
    lost = WorkerCrashedError("Host 0 (a) gave no sign of life for 30 s.", lost_host=0)
    failed = [FailedAttempt(plan, Failure.from_error(lost))]
    limits: dict[str, Any] = {
        "max_attempts": 5,
        "allow_degraded": False,
        "newest_checkpoint": None,
    }
    decision = decide_retry(failed, **limits)
    assert isinstance(decision, Retry)
    assert decision.plan.places == plan.places
    failed.append(FailedAttempt(decision.plan, failed[0].failure))
    assert isinstance(decide_retry(failed, **limits), GiveUp)


def wait_until(is_so: Callable[[], bool]) -> None:
    end = time.monotonic() + 240
    while not is_so():
        assert time.monotonic() < end
        time.sleep(0.1)


@contextmanager
def joined(plan: TrainPlan, job: JobDir, results: list[Any]) -> Iterator[None]:
    """Have host 1 join an attempt meanwhile, as its flow does."""
    host = job.host(1).create(plan)

    def join() -> None:
        wait_until(job.heartbeat.exists)
        results.append(try_worker("join", host, RankOutcome, stall_seconds=plan.stall_seconds))

    thread = threading.Thread(target=join)
    thread.start()
    try:
        yield
    finally:
        thread.join()


def adapter_of(outcome: AttemptOutcome) -> dict[str, Any]:
    return load_file(Path(outcome.best_checkpoint) / ADAPTER_FILE)


@pytest.mark.slow
def test_two_hosts_give_the_adapter_of_as_many_ranks_on_one(
    make_plan: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Bit by bit; each host has its own agent, and its ranks are numbered after the first's."""
    monkeypatch.delenv(faults.VARIABLE, raising=False)
    found = []
    for run, changes in (("one", {"places": (0, 1)}), ("two", {**ON_TWO, "places": (0, 2)})):
        plan = make_plan(run, **SCHEDULE, **changes)
        job, results = RunDir(Path(plan.run_dir)).attempt(1).create(plan), []
        with joined(plan, job, results) if plan.hosts == (0, 1) else threading.Lock():
            outcome = try_worker("ranks", job, AttemptOutcome, stall_seconds=300)
        assert isinstance(outcome, AttemptOutcome), outcome
        found.append(outcome)
    assert isinstance(results[0], RankOutcome), results
    one, two = map(adapter_of, found)
    assert all(one[name].equal(two[name]) for name in one)
    assert len(found[1].rank_peaks_gb) == 2


@pytest.mark.slow
@pytest.mark.parametrize(
    ("fault", "kind"),
    [("oom@step=4:rank=1", "OutOfMemoryError"), ("kill@step=4:rank=1", "WorkerCrashedError")],
)
def test_a_fault_on_another_host_is_the_failure_of_the_attempt(
    make_plan: Any, monkeypatch: pytest.MonkeyPatch, fault: str, kind: str
) -> None:
    """With its class, its rank and nothing lost; both hosts end."""
    monkeypatch.setenv(faults.VARIABLE, fault)
    plan = make_plan(**SCHEDULE, places=(0, 1), places_per_host=1)
    job, results = RunDir(Path(plan.run_dir)).attempt(1).create(plan), []
    with joined(plan, job, results):
        failure = try_worker("ranks", job, AttemptOutcome, stall_seconds=300)
    assert isinstance(failure, Failure)
    assert (failure.kind, failure.facts["rank"]) == (kind, 1)
    assert failure.what.startswith("Rank 1 of 2: ")
    assert "lost_host" not in failure.facts
    assert isinstance(results[0], Failure)


@pytest.mark.slow
def test_a_host_that_is_killed_while_it_loads_ends_the_attempt(make_plan: Any) -> None:
    """No connection exists that could break: the silence of its agent is what shows it."""
    plan = make_plan(**SCHEDULE, places=(0, 1), places_per_host=1)
    job = RunDir(Path(plan.run_dir)).attempt(1).create(plan)
    found: list[Any] = []

    def train() -> None:
        found.append(try_worker("ranks", job, AttemptOutcome, stall_seconds=300))

    thread = threading.Thread(target=train)
    thread.start()
    wait_until(job.heartbeat.exists)
    other = start_worker("join", job.host(1).create(plan))
    wait_until(job.rank(1).heartbeat.exists)
    other.kill()
    end_process_tree(other)
    thread.join()
    assert found[0].kind == "WorkerCrashedError"
    assert found[0].facts["lost_host"] == 1
