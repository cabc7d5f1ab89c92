"""A host that joins an attempt: it waits for a run in progress only."""

from __future__ import annotations

from contextlib import ExitStack
from pathlib import Path
from threading import Timer
from types import SimpleNamespace
from typing import Any
from unittest.mock import MagicMock, patch
from uuid import uuid4

import httpx
import pytest
from prefect.states import Failed, Running
from support.plans import environment, plan_for

from flows import hosts, join
from qwen3ft.config import TrainingConfig
from qwen3ft.digests import code_digest
from qwen3ft.errors import EnvironmentNotReadyError
from qwen3ft.jobs.folders import RunDir, write_record
from qwen3ft.locks import try_lock
from qwen3ft.machine.gpu_lock import FOLDER_VARIABLE, hold_gpu
from qwen3ft.records.machine import GpuUse
from qwen3ft.recovery.adjust import FailedAttempt, Retry, decide_retry


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
        hosts._ask(client, {"host": 1, "attempt": "runs/a/attempts/01"})
    assert len(keys) == 2
    assert len(set(keys)) == 1


def test_the_flow_run_of_a_lost_host_ends_as_crashed() -> None:
    """Its host cannot report it; those of the others end by themselves."""
    client, ids = MagicMock(), [uuid4(), uuid4()]
    client.read_flow_run.return_value.state = Running()
    with patch.object(hosts, "get_client") as get_client:
        get_client.return_value.__enter__.return_value = client
        hosts._end(dict(enumerate(ids, start=1)), even_running=False, lost=2)
    [call] = client.set_flow_run_state.call_args_list
    assert call.args[0] == ids[1]
    assert call.args[1].is_crashed()


def test_a_run_goes_on_without_a_host_that_refuses_a_later_attempt(tmp_path: Path) -> None:
    """As without one that is lost."""
    plan = plan_for().with_settings(places=(0, 1, 2, 3), places_per_host=2)
    attempt = RunDir(tmp_path).attempt(2).create(plan)
    refusal = hosts._refusal(1, Failed(message="gpus is 2, and this machine has 1.\nWhy: x"))
    failure = hosts.failure_of_host(refusal, attempt)
    assert attempt.read_failure() == failure
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
    """What a run before has freed counts, and what other programs took meanwhile."""
    machine = environment(80.0)
    [gpu] = machine.gpus
    full = GpuUse(total_bytes=gpu.total_bytes, free_bytes=1, processes=())
    free = full.model_copy(update={"free_bytes": gpu.total_bytes})
    later = iter((full, free))
    join._require_room(plan_for(), machine, "b", probe=lambda _: next(later), settle_seconds=9)
    with pytest.raises(EnvironmentNotReadyError, match="GPU 0 of b has "):
        join._require_room(plan_for(), machine, "b", probe=lambda _: full, settle_seconds=0)


def test_a_host_gives_up_at_once_on_a_run_that_is_gone(tmp_path: Path) -> None:
    """A run that was killed leaves no failure, and takes back no request; its lock is free."""
    run = RunDir(tmp_path)
    first = run.attempt(1).create(plan_for())
    with try_lock(run.lock):
        join._require_in_progress(first, run)
    with pytest.raises(EnvironmentNotReadyError, match="attempts/01 is over"):
        join._wait_for_start(first, run)
    with try_lock(run.lock):  # resumed
        second = run.attempt(2).create(plan_for())
        with pytest.raises(EnvironmentNotReadyError, match="attempts/01 is over"):
            join._wait_for_start(first, run)
        second.heartbeat.touch()
        join._wait_for_start(second, run)


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
