"""Agents of several hosts in one attempt: they start together, and one that is gone is missed."""

from __future__ import annotations

import errno
import os
import shutil
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import datetime, timedelta
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from safetensors.torch import load_file
from support.plans import plan_for

from flows.join import train_on_host
from qwen3ft import faults
from qwen3ft.errors import (
    FinetuneError,
    OutOfMemoryError,
    PreemptedError,
    RanksPartedError,
    WorkerCrashedError,
)
from qwen3ft.jobs.folders import JobDir, RunDir, write_record
from qwen3ft.jobs.launcher import try_worker
from qwen3ft.jobs.processes import PARENT_VARIABLE, end_process_tree, start_worker
from qwen3ft.model.adapter_checks import ADAPTER_FILE
from qwen3ft.records.plan import TrainPlan
from qwen3ft.records.training import AttemptOutcome, Failure, RankOutcome
from qwen3ft.recovery.adjust import FailedAttempt, GiveUp, Retry, decide_retry
from qwen3ft.worker import agent
from qwen3ft.worker import hosts as hosts_module
from qwen3ft.worker.agent import first_failure
from qwen3ft.worker.hosts import Agent, OtherHosts
from qwen3ft.worker.jobs import Job

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


def two_agents(attempt: JobDir) -> list[OtherHosts]:
    """Return the agents of two hosts, which have heard each other."""
    attempt.host(1).path.mkdir(parents=True)
    agents = [OtherHosts(Agent(attempt, host, {0: (0,), 1: (1,)})) for host in (0, 1)]
    for each in agents * 2:
        each.failures()
    return agents


def test_a_host_that_is_shut_down_is_gone_and_not_one_that_obeyed_a_rank(tmp_path: Path) -> None:
    """All ranks agree to stop; what they say of each other is no reason to wait for that host."""
    attempt = JobDir(tmp_path)
    here, _ = two_agents(attempt)
    attempt.rank(0).path.mkdir(parents=True)
    asked = PreemptedError("The worker was asked to stop (as another rank was).")
    write_record(attempt.rank(0).failure, Failure.from_error(asked))
    stopped = PreemptedError("The worker was asked to stop (SIGTERM).")
    write_record(attempt.host(1).failure, Failure.from_error(stopped))
    error = first_failure([attempt.rank(0)], {0: 1}, 0, here.last_words)
    name = hosts_module.socket.gethostname()
    assert error.what == f"Host 1 ({name}): The worker was asked to stop (SIGTERM)."
    decision = decide_retry(
        [FailedAttempt(plan_for().with_settings(**ON_TWO), Failure.from_error(error))],
        max_attempts=5,
        allow_degraded=False,
        newest_checkpoint=None,
    )
    assert isinstance(decision, Retry)
    assert decision.plan.hosts == (0,)
    of_a_rank = PreemptedError("Rank 1 of 2: The worker was asked to stop.", rank=1)
    write_record(attempt.host(1).failure, Failure.from_error(of_a_rank))
    assert "lost_host" not in here.last_words()[0].facts


def test_of_three_hosts_the_one_that_is_gone_is_named_without_waiting_for_all(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Host 1 says that host 2 was shut down, which itself says nothing any more."""

    def sleep(_: float) -> None:
        pytest.fail("it waits for a host that is gone, or for one that waits for this one")

    clock = SimpleNamespace(monotonic=time.monotonic, sleep=sleep)
    monkeypatch.setattr(hosts_module, "time", clock)
    attempt = JobDir(tmp_path)
    attempt.host(1).path.mkdir(parents=True)
    here = OtherHosts(Agent(attempt, 0, {0: (0,), 1: (1,), 2: (2,)}))
    stopped = PreemptedError("Host 2 (c): The worker was asked to stop (SIGTERM).", lost_host=2)
    write_record(attempt.host(1).failure, Failure.from_error(stopped))
    [failure] = here.last_words()
    assert (failure.what, failure.facts) == (stopped.what, {"lost_host": 2})
    full = OutOfMemoryError("Rank 1 of 3: Memory ran out.", rank=1, ranks=3)
    write_record(attempt.host(1).failure, Failure.from_error(full))
    assert [failure.what for failure in here.last_words()] == [full.what]


def three_hosts(attempt: JobDir) -> OtherHosts:
    """Return what host 0 sees, which host 1 says is gone: its folder was blocked for a while."""
    for host in (1, 2):
        attempt.host(host).path.mkdir(parents=True)
    lost = WorkerCrashedError("Host 0 (a) gave no sign of life for 31 s.", lost_host=0)
    write_record(attempt.host(1).failure, Failure.from_error(lost))
    return OtherHosts(Agent(attempt, 0, {0: (0,), 1: (1,), 2: (2,)}))


@pytest.mark.parametrize(
    "cause",
    [
        OutOfMemoryError("Rank 2 of 3: Memory ran out.", rank=2, ranks=3),
        PreemptedError("The worker was asked to stop (SIGTERM)."),
    ],
)
def test_a_host_that_is_told_that_it_is_gone_waits_for_the_cause(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, cause: FinetuneError
) -> None:
    """The next attempt must not ask a host again that has ended."""
    attempt = JobDir(tmp_path)
    here = three_hosts(attempt)

    def sleep(_: float) -> None:
        write_record(attempt.host(2).failure, Failure.from_error(cause))

    clock = SimpleNamespace(monotonic=time.monotonic, sleep=sleep)
    monkeypatch.setattr(hosts_module, "time", clock)
    parted = RanksPartedError("The connection to the other ranks broke.")
    write_record(attempt.rank(0).create(plan_for()).failure, Failure.from_error(parted))
    error = first_failure([attempt.rank(rank) for rank in range(3)], {0: 1}, 0, here.last_words)
    assert error.what.endswith(cause.what)
    assert error.facts.get("lost_host") == (2 if isinstance(cause, PreemptedError) else None)


def test_a_host_that_all_say_is_gone_says_so(tmp_path: Path) -> None:
    """Nobody has more to say, so it does not wait."""
    attempt = JobDir(tmp_path)
    here = three_hosts(attempt)
    shutil.copy(attempt.host(1).failure, attempt.host(2).failure)
    assert [failure.facts for failure in here.last_words()] == [{"lost_host": 0}] * 2


def test_ranks_go_on_for_a_while_when_another_host_has_lost_theirs(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """The cause may be on its way; once it is there, they are stopped for it."""
    attempt, sent = JobDir(tmp_path), list[tuple[int, int]]()
    here = three_hosts(attempt)
    monkeypatch.setattr(os, "kill", lambda *asked: sent.append(asked))
    job: Any = SimpleNamespace(heartbeat=SimpleNamespace(beat=lambda *_: None))
    follower = agent._Follower(job, [attempt.rank(rank) for rank in range(3)], here)
    follower.look(is_over=False)
    assert not sent
    full = OutOfMemoryError("Rank 2 of 3: Memory ran out.", rank=2, ranks=3)
    write_record(attempt.host(2).failure, Failure.from_error(full))
    follower.look(is_over=False)
    assert sent == [(os.getpid(), signal.SIGTERM)]
    assert [failure.what for failure in follower.ended] == [full.what]


def test_a_host_that_has_trained_to_the_end_is_not_missed(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Rank 0 may write its last checkpoint for long after that."""
    monkeypatch.setattr(hosts_module, "HOST_SILENT_SECONDS", 0.0)
    attempt = JobDir(tmp_path)
    here, _ = two_agents(attempt)
    attempt.host(1).outcome.touch()
    time.sleep(0.01)
    assert not here.failures()
    attempt.host(1).outcome.unlink()
    assert here.failures()


def test_what_another_host_said_counts_and_not_that_its_file_was_missing_before(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """A client of NFS keeps that in mind, until it opens the folder."""
    monkeypatch.setattr(hosts_module, "HOST_SILENT_SECONDS", 0.0)
    attempt, stat, listdir = JobDir(tmp_path), os.stat, os.listdir
    here, _ = two_agents(attempt)
    write_record(attempt.host(1).failure, Failure.from_error(OutOfMemoryError("Full.")))
    remembered = {str(attempt.host(1).failure)}

    def stat_as_remembered(path: Any, **options: Any) -> os.stat_result:
        if str(path) in remembered:
            raise FileNotFoundError(errno.ENOENT, "not found", str(path))
        return stat(path, **options)

    def list_anew(path: Any) -> list[str]:
        remembered.clear()
        return listdir(path)

    monkeypatch.setattr(os, "stat", stat_as_remembered)
    monkeypatch.setattr(os, "listdir", list_anew)
    [failure] = here.failures()
    assert failure.what == "Full."


def test_agents_beat_while_they_wait_for_each_other(tmp_path: Path) -> None:
    """That takes minutes where a host imports slowly, and is no stall of a rank."""
    attempt = JobDir(tmp_path)
    here = OtherHosts(Agent(attempt, 0, {0: (0,), 1: (1,)}))
    beats: list[str] = []
    job: Any = SimpleNamespace(heartbeat=SimpleNamespace(beat=lambda *sign: beats.append(sign)))
    follower = agent._Follower(job, [attempt.rank(0), attempt.rank(1)], here)
    for _ in range(3):
        follower.look(is_over=False)
    assert len(beats) == 3
    attempt.host(1).path.mkdir(parents=True)
    attempt.host(1).alive.write_text("b 1")
    for _ in range(3):
        follower.look(is_over=False)
    assert len(beats) == 3


def test_ranks_are_followed_on_when_a_file_could_not_be_read(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """A server of files that restarts, say: a thread that ended would look like a hang."""
    monkeypatch.setattr(agent, "LOOK_AT_RANKS_SECONDS", 0.01)
    attempt = JobDir(tmp_path)
    attempt.rank(0).path.mkdir(parents=True)
    beats, problems = threading.Semaphore(0), [OSError(errno.EIO, "I/O error")]

    def beat(*_: Any) -> None:
        beats.release()
        if problems:
            raise problems.pop()

    job: Any = SimpleNamespace(heartbeat=SimpleNamespace(beat=beat))
    here = OtherHosts(Agent(attempt, 0, {0: (0,)}))
    with agent._followed(job, [attempt.rank(0)], here):
        assert beats.acquire(timeout=10)
        attempt.rank(0).heartbeat.touch()
        assert beats.acquire(timeout=10)


def test_hosts_whose_clocks_differ_meet(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """By 20 s: torch's rendezvous would take one for dead after 15."""
    from torch.distributed.elastic.rendezvous import dynamic_rendezvous, registry
    from torch.distributed.elastic.rendezvous.api import RendezvousParameters

    class Clock(datetime):
        @classmethod
        def now(cls, tz: Any = None) -> datetime:
            late = threading.current_thread().name == "host 1"
            return datetime.now(tz) + timedelta(seconds=20 if late else 0)

    monkeypatch.setattr(dynamic_rendezvous, "datetime", Clock)
    monkeypatch.setenv("TORCH_DISABLE_SHARE_RDZV_TCP_STORE", "1")  # as an agent sets it
    attempt, found = JobDir(tmp_path), {}
    attempt.meeting_place.parent.mkdir()

    def meet(host: int) -> None:
        config = agent._launch_config(Agent(attempt, host, {0: (0,), 1: (1,)}), "a-run")
        given = RendezvousParameters(
            backend=config.rdzv_backend,
            endpoint=config.rdzv_endpoint,
            run_id=config.run_id,
            min_nodes=config.min_nodes,
            max_nodes=config.max_nodes,
            local_addr=config.local_addr,
            **config.rdzv_configs | {"join_timeout": 20},
        )
        place = registry.get_rendezvous_handler(given).next_rendezvous()
        found[host] = (place.rank, place.world_size)

    threads = [threading.Thread(target=meet, args=(n,), name=f"host {n}") for n in (0, 1)]
    for thread in threads:
        thread.start()
        time.sleep(0.2)
    for thread in threads:
        thread.join()
    assert found == {0: (0, 2), 1: (1, 2)}


def test_a_host_that_is_stopped_while_it_waits_for_the_others_was_stopped(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """The handler of torch raises in the middle of that."""
    from torch.distributed.elastic.multiprocessing import SignalException
    from torch.distributed.elastic.multiprocessing.api import PContext
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError, ProcessFailure
    from torch.distributed.launcher import api

    plan = plan_for().with_settings(places=(0, 1), places_per_host=1)
    job = Job(tmp_path / "01")
    job.dir.create(plan)

    def launch(*_: Any) -> None:
        parted = RanksPartedError("The connection to the other ranks broke.")
        write_record(job.dir.rank(0).failure, Failure.from_error(parted))
        raise ChildFailedError("rank", {0: ProcessFailure(0, 1, 1, "none")})

    def stop(_: float) -> None:
        raise SignalException("stopped", signal.SIGTERM)

    monkeypatch.setattr(api, "elastic_launch", lambda *_: launch)
    monkeypatch.setattr(
        PContext, "close", PContext.close
    )  # these and the agent's variables come back
    for name in ("OMP_NUM_THREADS", PARENT_VARIABLE, "TORCH_DISABLE_SHARE_RDZV_TCP_STORE"):
        monkeypatch.setenv(name, "1")
    monkeypatch.setattr(hosts_module, "time", SimpleNamespace(monotonic=time.monotonic, sleep=stop))
    with pytest.raises(PreemptedError, match="SIGTERM"):
        agent.train_ranks(job)


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
        results.append(train_on_host(host, plan))

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
    [
        ("oom@step=4:rank=1", "OutOfMemoryError"),
        ("kill@step=4:rank=1", "WorkerCrashedError"),
        # Its host's own agent hears less, and must not be the first to end it.
        ("stop@step=4:rank=1", "StalledError"),
    ],
)
def test_a_fault_on_another_host_is_the_failure_of_the_attempt(
    make_plan: Any, monkeypatch: pytest.MonkeyPatch, fault: str, kind: str
) -> None:
    """With its class, its rank and nothing lost; both hosts end."""
    monkeypatch.setenv(faults.VARIABLE, fault)
    plan = make_plan(**SCHEDULE, places=(0, 1), places_per_host=1, stall_seconds=60.0)
    job, results = RunDir(Path(plan.run_dir)).attempt(1).create(plan), []
    with joined(plan, job, results):
        failure = try_worker("ranks", job, AttemptOutcome, stall_seconds=plan.stall_seconds)
    assert isinstance(failure, Failure)
    assert (failure.kind, failure.facts["rank"]) == (kind, 1)
    assert failure.what.startswith("Rank 1 ")
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
