"""Hosts that join a training: asked for once, they stay while the run is in progress."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from threading import Timer
from types import SimpleNamespace
from typing import Any
from unittest.mock import MagicMock, patch
from uuid import uuid4

import httpx
import pytest
from prefect.exceptions import ObjectNotFound, PrefectHTTPStatusError
from prefect.states import Failed, Running
from support.plans import environment, plan_for

from flows import finetune, hosts, join
from qwen3ft.config import TrainingConfig
from qwen3ft.disk.digests import code_digest
from qwen3ft.disk.locks import try_lock
from qwen3ft.errors import EnvironmentNotReadyError, WorkerCrashedError
from qwen3ft.jobs.folders import JobDir, RunDir, write_record
from qwen3ft.machine.gpu_lock import FOLDER_VARIABLE, hold_gpu
from qwen3ft.machine.network import INTERFACE_VARIABLES
from qwen3ft.records.machine import GpuUse
from qwen3ft.records.plan import TrainPlan
from qwen3ft.records.training import Failure
from qwen3ft.recovery.adjust import FailedAttempt, Retry, decide_retry
from qwen3ft.tracking.journal import Journal

THREE = {"places": (0, 1, 2), "places_per_host": 1}


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[MagicMock]:
    """Prefect's server: it knows the deployment of other hosts, and all of them train."""
    monkeypatch.setenv(INTERFACE_VARIABLES[0], "lo")
    client = MagicMock()
    client.create_flow_run_from_deployment.side_effect = lambda *_, **__: SimpleNamespace(
        id=uuid4()
    )
    client.read_flow_run.return_value.state = Running()
    with (
        patch.object(hosts, "get_client") as get_client,
        patch.object(hosts, "_POLL_SECONDS", 0),
    ):
        get_client.return_value.__enter__.return_value = client
        yield client


def three_hosts(run: RunDir) -> tuple[hosts.JoinedHosts, TrainPlan]:
    """Return a run's other hosts and the plan of its first attempt, for which they are ready."""
    plan = plan_for().with_settings(**THREE, attempt=1)
    for host in (1, 2):
        run.attempt(1).host(host).create(plan)
    return hosts.JoinedHosts(TrainingConfig(hosts=3), run), plan


def test_a_host_is_asked_for_once_though_the_server_answers_late() -> None:
    """Each request has the same key, by which the server knows it again."""
    client, keys = MagicMock(), []

    def create(*_: Any, idempotency_key: str, **__: Any) -> Any:
        keys.append(idempotency_key)
        if len(keys) == 1:
            raise httpx.ReadTimeout("late")
        return SimpleNamespace(id=uuid4())

    client.create_flow_run_from_deployment.side_effect = create
    with patch.object(hosts, "_POLL_SECONDS", 0):
        hosts._ask(client, uuid4(), JobDir(Path("runs/a/attempts/01")), 1, "")
    assert len(keys) == 2
    assert len(set(keys)) == 1


def test_a_request_that_the_server_refuses_is_made_once() -> None:
    """A wrong password does not become right within two minutes."""
    client = MagicMock()
    answer = httpx.Response(401, request=httpx.Request("GET", "http://a/api"))
    problem = PrefectHTTPStatusError("401", request=answer.request, response=answer)
    client.read_deployment_by_name.side_effect = problem
    with pytest.raises(EnvironmentNotReadyError, match="cannot be asked for") as refused:
        hosts._find_deployment(client)
    assert refused.value.why == "The Prefect server refuses it."


def test_a_host_is_asked_for_once_in_a_training(server: MagicMock, tmp_path: Path) -> None:
    """It stays for the next attempt, so its number is the same machine; one that is lost ends.

    Its host cannot report the end of its flow run; those of the others end by themselves.
    """
    run = RunDir(tmp_path)
    joined, plan = three_hosts(run)
    with joined.joined():
        joined.gather(plan, environment(None))
        assert server.create_flow_run_from_deployment.call_count == 2
        [_, gone] = joined._asked.values()
        lost = WorkerCrashedError("Host 2 (b) gave no sign of life for 30 s.", lost_host=2)
        write_record(run.attempt(1).failure, Failure.from_error(lost))
        following = plan.with_settings(attempt=2, places=(0, 1))
        run.attempt(2).host(1).create(following)
        joined.gather(following, environment(None))
    assert server.create_flow_run_from_deployment.call_count == 2
    [call] = server.set_flow_run_state.call_args_list
    assert call.args[0] == gone
    assert call.args[1].is_crashed()


def test_a_host_that_ends_while_the_run_waits_for_another_is_seen(
    server: MagicMock, tmp_path: Path
) -> None:
    """Though it was ready: the attempt is not begun without it."""
    run = RunDir(tmp_path)
    joined, plan = three_hosts(run)
    (run.attempt(1).host(2).request).unlink()
    states = iter([Failed(message="out of memory\nWhy: x\nNext: free")])
    server.read_flow_run.side_effect = lambda _: SimpleNamespace(state=next(states, Running()))
    with pytest.raises(EnvironmentNotReadyError, match="Host 1 did not join: out of") as refused:
        joined.gather(plan, environment(None))
    assert refused.value.facts["host"] == 1


def test_a_host_whose_flow_run_was_deleted_has_refused(server: MagicMock, tmp_path: Path) -> None:
    """It is not asked about for hours."""
    joined, plan = three_hosts(RunDir(tmp_path))
    RunDir(tmp_path).attempt(1).host(2).request.unlink()
    server.read_flow_run.side_effect = ObjectNotFound(Exception("404"))
    with pytest.raises(EnvironmentNotReadyError, match="Its flow run was deleted"):
        joined.gather(plan, environment(None))


def test_a_run_looks_at_the_way_to_its_hosts_before_it_prepares_anything(
    server: MagicMock, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Quantising a model for an hour comes after."""
    monkeypatch.setenv(INTERFACE_VARIABLES[0], "eth77")
    with pytest.raises(EnvironmentNotReadyError, match="'eth77', which is not there"):
        hosts.JoinedHosts(TrainingConfig(hosts=2), RunDir(tmp_path))
    assert not list(tmp_path.iterdir())


def test_a_run_goes_on_without_a_host_that_is_gone_before_a_later_attempt(tmp_path: Path) -> None:
    """As without one that is lost; the journal and the card have the attempt, with its reason."""
    plan = plan_for().with_settings(places=(0, 1, 2, 3), places_per_host=2, attempt=2)
    run = RunDir(tmp_path)
    attempt = run.attempt(2).create(plan)
    refusal = hosts._refusal(1, Failed(message="gpus is 2, and this machine has 1.\nWhy: x"))
    failure = hosts.failure_of_hosts(refusal, plan, run)
    assert attempt.read_failure() == failure
    assert failure.kind == "EnvironmentNotReadyError"
    journal = Journal(run).path.read_text()
    assert [f'"{word}"' in journal for word in ("attempt_started", "attempt_ended")] == [True] * 2
    decision = decide_retry(
        [FailedAttempt(plan, failure)],
        max_attempts=5,
        allow_degraded=False,
        newest_checkpoint=None,
    )
    assert isinstance(decision, Retry)
    assert decision.plan.places == (0, 1)
    assert "Host 1 did not join: gpus is 2" in decision.plan.reasons["places"]


def test_a_folder_is_claimed_once(tmp_path: Path) -> None:
    """By one of two flow runs for the same host of an attempt."""
    job = RunDir(tmp_path).attempt(1).host(1)
    assert [job.claim(), job.claim()] == [True, False]


def test_a_host_looks_at_the_memory_that_is_free_once_it_holds_the_gpu() -> None:
    """What a run before has freed counts, and what other programs took meanwhile.

    A GPU that recovery left out is not looked at: it may be the one that failed.
    """
    machine = environment(80.0)
    [gpu] = machine.gpus
    machine = machine.model_copy(update={"gpus": (gpu, gpu.model_copy(update={"uuid": "bad"}))})
    plan = plan_for().with_settings(places=(0, 1, 2), places_per_host=2)
    full = GpuUse(total_bytes=gpu.total_bytes, free_bytes=1, processes=())
    free = full.model_copy(update={"free_bytes": gpu.total_bytes})
    later, looked = iter((full, free)), []
    join._require_room(
        plan, 1, machine, "b", probe=lambda u: looked.append(u) or next(later), settle_seconds=9
    )
    assert set(looked) == {gpu.uuid}
    with pytest.raises(EnvironmentNotReadyError, match="GPU 0 of b has "):
        join._require_room(plan, 1, machine, "b", probe=lambda _: full, settle_seconds=0)


def test_a_host_gives_up_at_once_on_a_run_that_is_gone(tmp_path: Path) -> None:
    """A run that was killed leaves no failure, and takes back no request; its lock is free."""
    run = RunDir(tmp_path)
    first = run.attempt(1).create(plan_for())
    with try_lock(run.lock):
        join._require_in_progress(first, run)
    for wait in (join._has_begun, join._next_attempt):
        with pytest.raises(EnvironmentNotReadyError, match="attempts/01 is over"):
            wait(first, run)
    with try_lock(run.lock):  # resumed
        second = run.attempt(2).create(plan_for())
        for wait in (join._has_begun, join._next_attempt):
            with pytest.raises(EnvironmentNotReadyError, match="attempts/01 is over"):
                wait(first, run)
        second.heartbeat.touch()
        assert join._has_begun(second, run)


def test_a_host_stays_for_the_next_attempt_until_one_has_trained_to_the_end(
    tmp_path: Path,
) -> None:
    """Also after an attempt that never began, as a third host refused it."""
    run = RunDir(tmp_path)
    first = run.attempt(1).create(plan_for())
    write_record(first.failure, Failure.from_error(WorkerCrashedError("x")))
    with try_lock(run.lock):
        assert not join._has_begun(first, run)
        second = run.attempt(2).create(plan_for())
        assert join._next_attempt(first, run) == second
        second.outcome.touch()
        assert join._next_attempt(second, run) is None


def test_a_host_of_another_version_says_so_whatever_it_cannot_read(tmp_path: Path) -> None:
    """A newer plan has fields that it does not know."""
    job = RunDir(tmp_path).attempt(1).create(plan_for())
    job.request.write_text('{"a new field": 1}')
    with pytest.raises(EnvironmentNotReadyError, match="has another version of qwen3ft"):
        join._join(job, 1, "another", "")


def test_a_host_of_another_user_says_that_it_does_not_see_the_folder(tmp_path: Path) -> None:
    """It may not enter the run's folder."""
    job = RunDir(tmp_path / "runs" / "a").attempt(1).create(plan_for())
    stat = os.stat

    def stat_as_another(path: Any, **options: Any) -> os.stat_result:
        if str(path).startswith(str(job.path)):
            raise PermissionError(13, "Permission denied")
        return stat(path, **options)

    with (
        patch.object(os, "stat", stat_as_another),
        pytest.raises(EnvironmentNotReadyError, match=r"attempts/01 \(Permission denied\)"),
    ):
        join._join(job, 1, code_digest(), "")


def test_a_run_that_was_continued_elsewhere_ends_here(tmp_path: Path) -> None:
    """The host was cut off from the folder while it trained: only one of two may promote."""
    plan, run = plan_for().with_settings(attempt=1), RunDir(tmp_path)
    run.attempt(1).create(plan)
    finetune._require_newest(plan, run)
    run.attempt(2).create(plan)
    with pytest.raises(EnvironmentNotReadyError, match="beside attempt 1"):
        finetune._require_newest(plan, run)


def test_a_host_that_waits_for_a_gpu_hears_that_its_run_is_gone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It gives up within a second, however long it might wait."""
    monkeypatch.setenv(FOLDER_VARIABLE, str(tmp_path / "locks"))
    machine = environment(80.0)
    [gpu] = machine.gpus
    monkeypatch.setattr(join.EnvironmentManager, "report", lambda _: machine)
    run, plan = RunDir(tmp_path / "run"), plan_for()
    plan = plan.with_settings(
        run_dir=str(run.path),
        places=(0, 1),
        places_per_host=1,
        model=plan.model.model_copy(update={"path": str(tmp_path)}),
        dataset=plan.dataset.model_copy(update={"path": str(tmp_path)}),
    )
    attempt = run.attempt(plan.attempt).create(plan)
    attempt.path.chmod(0o700)
    write_record(run.config, TrainingConfig(hosts=2, wait_for_gpu_seconds=3))
    with ExitStack() as alive, hold_gpu(gpu.uuid, "b", when_busy="refuse", wait_seconds=0):
        alive.enter_context(try_lock(run.lock))
        Timer(0.3, alive.close).start()
        with pytest.raises(EnvironmentNotReadyError, match="attempts/01 is over"):
            join._join(attempt, 1, code_digest(), gpu.name)
