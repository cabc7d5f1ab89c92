"""Several hosts: network namespaces with a Prefect worker each, one PostgreSQL, artifacts on S3.

PostgreSQL, both servers, the S3 server and the workers are real; the hosts are network namespaces
of this machine.
"""

from __future__ import annotations

import json
import re
import shutil
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from support.hosts import Host, started_hosts
from support.team import needs_postgres

from deployments.processes import stop
from qwen3ft.jobs.folders import JobDir, RunDir, read_record
from qwen3ft.model.adapter_checks import ADAPTER_FILE
from qwen3ft.records.plan import TrainPlan
from qwen3ft.records.run_card import COMPLETED_STATES
from qwen3ft.records.training import AttemptOutcome

pytestmark = [pytest.mark.slow, pytest.mark.timeout(3000), needs_postgres]

SMALL = {
    "model_name": "embedded",
    "max_memory_gb": 4.0,
    "max_new_tokens": 24,
    "max_steps": 6,
    "evaluate_every_steps": 2,
    "inference_rows": 24,
    "max_rows": 96,
}
RUN_SECONDS = 900.0
LONGER = {"max_steps": 60, "evaluate_every_steps": 5, "early_stopping_patience": 60}


@pytest.fixture(scope="module")
def team_hosts() -> Iterator[list[Host]]:
    """Two hosts and a deployment that two runs may use at once."""
    with started_hosts(2) as made:
        team = made[0].team
        team.run("work-pool", "create", "qwen3ft", "--type", "process")
        deploy = ("deploy", "--prefect-file", "deployments/prefect.yaml")
        team.run(*deploy, "--all")
        team.run(*deploy, "--name", "default", "--concurrency-limit", "2")
        yield made


@pytest.fixture
def hosts(team_hosts: list[Host]) -> Iterator[list[Host]]:
    """The hosts; their workers end with the test."""
    yield team_hosts
    for host in team_hosts:
        stop(host.processes())
        host.folder = None


def give_own_folder(host: Host) -> Path:
    """Let the host have a project folder of its own, at the path of the others'."""
    host.folder = host.team.root / f"{host.name}-{time.monotonic_ns()}"
    shutil.copytree(host.team.root / "project" / "deployments", host.folder / "deployments")
    (host.folder / "flows").symlink_to((host.team.project / "flows").resolve())
    return host.folder


def start_run(host: Host, **settings: Any) -> str:
    """Ask for a run of the deployment; return its id."""
    deployment = host.team.get("prefect", "/api/deployments/name/qwen3-finetune/default")
    asked = {"parameters": {"config": SMALL | settings}}
    made = host.team.get("prefect", f"/api/deployments/{deployment['id']}/create_flow_run", asked)
    return str(made["id"])


def wait_for(host: Host, run: str) -> dict[str, Any]:
    """Wait until a run has ended."""
    end = time.monotonic() + RUN_SECONDS
    found: dict[str, Any] = {}
    while found.get("state_type") in (None, "SCHEDULED", "PENDING", "RUNNING"):
        assert time.monotonic() < end, host.team.logs()
        time.sleep(1)
        found = host.team.get("prefect", f"/api/flow_runs/{run}")
    return found


def wait_for_success(host: Host, run: str) -> dict[str, Any]:
    """Wait until a run has completed."""
    found = wait_for(host, run)
    assert found["state_name"] in COMPLETED_STATES, f"{found['state']}\n{host.team.logs()}"
    return found


def folder_on(host: Host, run: str) -> Path:
    """Return the folder of a run in a host's project folder."""
    return (host.folder or host.team.project) / "runs" / run


def test_runs_on_two_hosts_share_champions_through_mlflow(hosts: list[Host]) -> None:
    """Two at once, one on each; the second of a task on the other host; a rollback from the first.

    The hosts share no file: an adapter reaches the other one through MLflow, which has it on S3.
    """
    for host in hosts:
        give_own_folder(host)
        host.start_worker()
    first, beside = (start_run(hosts[0], name=name) for name in ("first", "beside"))
    found = [wait_for_success(hosts[0], run) for run in (first, beside)]
    assert max(each["start_time"] for each in found) < min(each["end_time"] for each in found)
    [one] = [host for host in hosts if folder_on(host, first).exists()]
    [other] = [host for host in hosts if folder_on(host, beside).exists()]
    assert one is not other

    other.qwen3ft("promote", "1", "--set", "name=first")
    stop(one.processes())
    second = start_run(other, name="first", learning_rate=2e-3)
    wait_for_success(other, second)
    card = json.loads((folder_on(other, second) / "card.json").read_text())
    assert card["champion_version"] == "1"
    other.qwen3ft("promote", "2", "--set", "name=first")
    one.qwen3ft("rollback", "--reason", "a test", "--set", "name=first")
    history = json.loads(other.qwen3ft("history", "--json", "--set", "name=first"))
    assert history["aliases"]["champion"] == "1"
    assert history["moves"][-1]["action"] == "rollback"


def machine_of(folder: JobDir) -> str:
    """Return the name of the machine that works as a host of an attempt."""
    while not (words := folder.alive.read_text().split()):  # it is just being written again
        time.sleep(0.05)
    return words[0]


def adapter_of(run: RunDir) -> torch.Tensor:
    outcome = read_record(run.attempts()[-1].outcome, AttemptOutcome)
    tensors = load_file(Path(outcome.best_checkpoint) / ADAPTER_FILE)
    return torch.cat([tensors[name].flatten() for name in sorted(tensors)])


def test_a_training_over_two_hosts_goes_on_when_the_second_is_lost(hosts: list[Host]) -> None:
    """First undisturbed; then with the second host off the network and dead, all at once.

    The run ends on the first host, with the adapter of the undisturbed one within 1e-5.
    """
    for host in hosts:
        host.start_worker()
    whole = RunDir(folder_on(hosts[0], start_run(hosts[0], name="whole", hosts=2, **LONGER)))
    wait_for_success(hosts[0], whole.path.name)
    [attempt] = whole.attempts()
    assert read_record(attempt.request, TrainPlan).hosts == (0, 1)
    names = {machine_of(folder) for folder in (attempt, attempt.host(1))}
    assert names == {host.name for host in hosts}
    assert attempt.host(1).outcome.exists()

    lost = RunDir(folder_on(hosts[0], start_run(hosts[0], name="lost", hosts=2, **LONGER)))
    end = time.monotonic() + RUN_SECONDS
    while not list(lost.attempt(1).checkpoints.glob("step-*")):
        assert time.monotonic() < end, hosts[0].team.logs()
        time.sleep(0.1)
    gone = machine_of(lost.attempt(1).host(1))
    [second] = [host for host in hosts if host.name == gone]
    second.lose()
    wait_for_success(hosts[0], lost.path.name)
    before, after = lost.attempts()
    failure = before.read_failure()
    assert failure is not None
    assert failure.facts["lost_host"] == 1
    assert failure.what.startswith(f"Host 1 ({gone}) gave no sign of life")
    plan = read_record(after.request, TrainPlan)
    assert plan.places == (0,)
    assert plan.resume_from is not None
    found, wanted = adapter_of(lost), adapter_of(whole)
    assert float((found - wanted).norm() / wanted.norm()) <= 1e-5
    second.restore()


def test_the_printed_command_goes_on_and_a_host_that_is_stopped_in_order_is_left_out(
    hosts: list[Host],
) -> None:
    """First nobody comes; then the run is resumed on two hosts, and one of them is shut down.

    The run ends on the other one, in the next attempt.
    """
    hosts[0].start_worker()
    short = {"hosts": 2, "wait_for_gpu_seconds": 60}
    run = start_run(hosts[0], name="resumed", **short, **LONGER)
    found = wait_for(hosts[0], run)
    assert found["state_type"] == "FAILED"
    alone = f"Next: qwen3ft train --resume {run} --set hosts=1"
    assert "0 of 1 further hosts came within 6" in found["state"]["message"]
    assert found["state"]["message"].endswith(alone)

    folder = RunDir(folder_on(hosts[0], run))
    refused = folder.attempt(1).read_failure()
    assert refused is not None
    assert refused.kind == "EnvironmentNotReadyError"
    steps = json.loads((folder.path / "card.json").read_text())["next_steps"]
    [again] = [step["command"] for step in steps if "continue_run" in step["command"]]
    hosts[1].start_worker()
    [resumed] = re.findall("UUID: ([0-9a-f-]{36})", hosts[0].typed(again))
    end = time.monotonic() + RUN_SECONDS
    while not list(folder.path.glob("attempts/02/checkpoints/step-*")):
        assert time.monotonic() < end, hosts[0].team.logs()
        time.sleep(0.1)
    gone = machine_of(folder.attempt(2).host(1))
    [second] = [host for host in hosts if host.name == gone]
    stop(second.processes())
    wait_for_success(hosts[0], resumed)
    _, before, after = folder.attempts()
    failure = before.read_failure()
    assert failure is not None
    # Its agent says so if it is not killed with its flow's process, else its silence does.
    assert failure.what.startswith(f"Host 1 ({gone})")
    assert failure.facts["lost_host"] == 1
    assert read_record(before.request, TrainPlan).hosts == (0, 1)
    plan = read_record(after.request, TrainPlan)
    assert plan.places == (0,)
    assert plan.resume_from is not None


def test_a_host_without_the_folder_refuses_before_anything_is_trained(hosts: list[Host]) -> None:
    """The run says which host, why, and the one next command."""
    first, second = hosts
    first.start_worker()
    run = start_run(first, name="refused", hosts=2)
    while not folder_on(first, run).exists():
        time.sleep(0.5)
    give_own_folder(second)
    second.start_worker()
    found = wait_for(first, run)
    assert found["state_type"] == "FAILED"
    attempt = RunDir(folder_on(first, run)).attempt(1)
    message = found["state"]["message"]
    assert f"Host 1 did not join: {second.name} does not see the folder {attempt.path}" in message
    assert f"Next: ls -lan {folder_on(first, run).parents[1]}" in message
    assert not attempt.metrics.exists()
