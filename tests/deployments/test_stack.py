"""The local stack with real servers, worker and deployment, in a folder of its own."""

from __future__ import annotations

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
import tomllib
import urllib.error
import urllib.request
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import psutil
import pytest
from support.databases import place_databases

from deployments import services
from deployments.automations import RESUME_AUTOMATION, SILENT_SECONDS, ZOMBIE_AUTOMATION
from deployments.deploy import NO_GPU_LINE, PREFECT_FILE, choose_defaults, deploy
from deployments.orphans import OrphanSweep
from deployments.pages import POLICY
from deployments.prefect_api import read_deployment, send
from deployments.processes import MARK, SERVICE_MARK, find_marked, free_port, start_detached, stop
from deployments.schedule import Schedule, change_schedule, read_schedule
from deployments.secret import authorization
from deployments.services import DEPLOYMENT, POOL, SERVICES, Layout
from deployments.stack import Stack, StackStatus
from qwen3ft.errors import ConfigError, EnvironmentNotReadyError
from qwen3ft.machine.environment import EnvironmentManager
from qwen3ft.records.run_card import ALREADY_DONE

ROOT = Path(__file__).parents[2]
RUNS = "flow_runs/filter"

FLOW = '''
"""A flow with the name and the parameters of the real one, which does nothing."""

from prefect import flow

from qwen3ft.config import TrainingConfig


@flow(name="qwen3-finetune")
def qwen3_finetune(
    config: TrainingConfig = TrainingConfig(),
    continue_run: str | None = None,
    nightly: bool = False,
    resumed: int = 0,
):
    pass
'''


@pytest.fixture(scope="module")
def stack(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stack]:
    """Start a stack in a project folder with a flow that does nothing.

    Its pool is paused: nobody waits for runs that take seconds and do nothing.
    """
    root = tmp_path_factory.mktemp("a project")  # a path with a space
    (root / "deployments").mkdir()
    entry = ("qwen3ft.entry_points.qwen3_finetune ", "flows/finetune.py:qwen3_finetune ")
    text = (ROOT / PREFECT_FILE).read_text().replace(*entry)  # the flow of this project
    (root / PREFECT_FILE).write_text(text)
    shutil.copytree(ROOT / "deployments" / "configs", root / "deployments" / "configs")
    (root / "flows").mkdir()
    (root / "flows" / "finetune.py").write_text(FLOW)
    place_databases(root)
    made = Stack(root, {"prefect": 4700, "mlflow": 5700})
    try:
        made.up()
        pause(made, is_paused=True)
        yield made
    finally:
        made.down()


@pytest.fixture(autouse=True)
def no_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """The deployment's settings depend on it."""
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")


def registered(stack: Stack) -> dict[str, Any]:
    """Register the deployment if it is not; return it as the server knows it."""
    deploy(stack)
    found = read_deployment(stack.layout())
    assert found is not None
    return found


def pause(stack: Stack, *, is_paused: bool) -> None:
    """Keep the stack's worker from starting runs, or let it."""
    send(stack.layout(), f"work_pools/{POOL}", {"is_paused": is_paused}, "PATCH")


def text_of(stack: Stack, url: str, *request: Any) -> str | None:
    """Return what a server of the stack answers."""
    return services.request_text(stack.layout().secret, url, *request)


def json_of(stack: Stack, url: str, *request: Any) -> Any:
    """Return what a server of the stack answers, parsed."""
    return services.request_json(stack.layout().secret, url, *request)


def _pids(status: StackStatus) -> dict[str, int | None]:
    return {service.name: service.pid for service in status.services}


def test_everything_listens_on_loopback_only(stack: Stack) -> None:
    """All three are healthy, and no other machine can reach their sockets."""
    status = stack.status()
    assert status.up
    addresses = {
        connection.laddr.ip
        for process in find_marked(stack.root)
        for connection in process.net_connections(kind="inet")
        if connection.status == psutil.CONN_LISTEN
    }
    assert addresses == {"127.0.0.1"}


def test_a_second_up_starts_nothing(stack: Stack) -> None:
    """Services that are up stay as they are, and nothing is printed."""
    before, said = _pids(stack.status()), list[str]()
    assert _pids(stack.up(said.append)) == before
    assert said == []


@pytest.mark.slow
def test_two_ups_at_once_restart_a_killed_server_once(stack: Stack) -> None:
    """The orphans of the killed server are removed; the other services and the port stay."""
    before = stack.status()
    os.kill(_pids(before)["mlflow"] or 0, signal.SIGKILL)
    code = (
        "import sys; from pathlib import Path; from deployments.stack import Stack; "
        "print(Stack(Path(sys.argv[1])).up().model_dump_json())"
    )
    ups = [
        subprocess.Popen(
            [sys.executable, "-c", code, str(stack.root)],
            cwd=ROOT,
            stdout=subprocess.PIPE,
            text=True,
        )
        for _ in range(2)
    ]
    outputs = [up.communicate(timeout=120)[0] for up in ups]
    first, second = map(StackStatus.model_validate_json, outputs)
    assert first.up
    assert _pids(first) == _pids(second)
    assert (first.prefect_url, first.mlflow_url) == (before.prefect_url, before.mlflow_url)
    changed = {name for name in SERVICES if _pids(first)[name] != _pids(before)[name]}
    assert changed == {"mlflow"}


@pytest.mark.parametrize("version", ["v1", "v2"])
def test_prefects_pages_may_connect_to_this_machine_only(stack: Stack, version: str) -> None:
    """Both versions are served with the policy; test_browser.py checks that a browser obeys it."""
    path = "/v2/dashboard" if version == "v2" else "/runs"
    url = stack.layout().url("prefect") + path
    signed_in = {"Accept": "text/html", "Authorization": authorization(stack.layout().secret)}
    request = urllib.request.Request(url, headers=signed_in)
    with urllib.request.build_opener(urllib.request.ProxyHandler({})).open(request) as answer:
        page = answer.read().decode()
    assert f'href="{"/v2" if version == "v2" else ""}/ico/' in page
    assert page.count(POLICY) == 1


def test_the_deployment_is_registered_once_and_as_declared(stack: Stack) -> None:
    """It has one run at a time, a nightly schedule that is off, and a model for this machine."""
    said: list[str] = []
    assert deploy(stack, said.append) is True
    assert deploy(stack) is False
    assert NO_GPU_LINE in said
    found = registered(stack)
    assert found["parameters"] == {"config": choose_defaults(stack.root).config}
    assert found["concurrency_options"]["collision_strategy"] == "ENQUEUE"
    assert found["global_concurrency_limit"]["limit"] == 1
    [schedule] = found["schedules"]
    assert (schedule["active"], schedule["schedule"]["cron"]) == (False, "0 2 * * *")
    assert stack.status().deployment_registered


@pytest.mark.slow  # registers twice
def test_a_deployment_for_further_hosts_that_is_missing_is_registered_again(stack: Stack) -> None:
    """Both are made of one file."""
    registered(stack)
    only_join = {"deployments": {"name": {"any_": ["join"]}}}
    [join] = send(stack.layout(), "deployments/filter", only_join)
    send(stack.layout(), f"deployments/{join['id']}", method="DELETE")
    assert deploy(stack) is True
    assert send(stack.layout(), "deployments/filter", only_join)
    assert deploy(stack) is False


@pytest.mark.parametrize(
    ("parameters", "named"),
    [
        ({"confg": {"seed": 1}}, "confg"),
        ({"num_epochs": 2}, "num_epochs"),
        ({"config": {"sede": 1}}, "sede"),
        ({"config": {"columns": {"qestion": "q"}}}, "qestion"),
        ({"Config": {}}, "Config"),
    ],
)
def test_a_misspelt_parameter_is_refused_by_name(
    stack: Stack, parameters: dict[str, Any], named: str
) -> None:
    """At the top and in the settings, before anything is started."""
    deployment = registered(stack)
    api = f"{stack.layout().url('prefect')}/api"
    before = json_of(stack, f"{api}/flow_runs/count", {})
    request = urllib.request.Request(
        f"{api}/deployments/{deployment['id']}/create_flow_run",
        data=json.dumps({"parameters": parameters}).encode(),
        headers={
            "Content-Type": "application/json",
            "Authorization": authorization(stack.layout().secret),
        },
    )
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    with pytest.raises(urllib.error.HTTPError) as refused:
        opener.open(request)
    assert refused.value.code == 409
    assert named in refused.value.read().decode()
    assert json_of(stack, f"{api}/flow_runs/count", {}) == before


def _wait_for_planned_runs(stack: Stack, time_of_day: str) -> None:
    """Wait until the server's scheduler has planned the coming nights, within a minute or so."""
    api = f"{stack.layout().url('prefect')}/api"
    wanted = {"flow_runs": {"tags": {"all_": ["auto-scheduled"]}}}
    end = time.monotonic() + 90
    while not (planned := json_of(stack, f"{api}/flow_runs/filter", wanted)):
        assert time.monotonic() < end, "a schedule that is on has planned nothing"
        time.sleep(0.5)
    assert {run["expected_start_time"][11:16] for run in planned} == {time_of_day}


def test_prefect_typed_in_the_folder_talks_to_the_stack(stack: Stack, tmp_path: Path) -> None:
    """That works through prefect.toml, without a profile and without touching the home folder."""
    deploy(stack)
    kept = {name: text for name, text in os.environ.items() if not name.startswith("PREFECT_")}
    done = subprocess.run(
        [sys.executable, "-m", "prefect", "deployment", "ls"],
        cwd=stack.root,
        env={**kept, "HOME": str(tmp_path), "DO_NOT_TRACK": "1", "COLUMNS": "200"},
        capture_output=True,
        text=True,
    )
    assert DEPLOYMENT in done.stdout, done.stderr
    assert list(tmp_path.iterdir()) == []


def _start_at(stack: Stack, address: str, body: dict[str, object]) -> str:
    """Make a run that the server believes to be running; return its id."""
    api = f"{stack.layout().url('prefect')}/api"
    run = json_of(stack, f"{api}/{address}", body)
    forced = {"state": {"type": "RUNNING"}, "force": True}
    assert text_of(stack, f"{api}/flow_runs/{run['id']}/set_state", forced) is not None
    begin(stack, run["id"])
    return str(run["id"])


def begin(stack: Stack, run: str) -> Path:
    """Write the settings of a run, which makes it one that has begun; return their path."""
    path = stack.root / "runs" / run / "config.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("{}")
    return path


def _wait_for_resumption(stack: Stack, api: str, crashed: str) -> dict[str, Any]:
    """Return the run that was started to continue `crashed`."""
    end = time.monotonic() + 60
    while time.monotonic() < end:
        for run in json_of(stack, f"{api}/filter", {}):
            if run["parameters"].get("continue_run") == crashed:
                found: dict[str, Any] = run
                return found
        time.sleep(0.5)
    raise AssertionError(f"nothing continues {crashed}")


@pytest.mark.parametrize("spared", ["mlflow", pytest.param("", marks=pytest.mark.slow)])
def test_a_run_that_was_killed_with_everything_else_is_ended_and_continued_by_the_next_up(
    stack: Stack, spared: str
) -> None:
    """Otherwise, after a power cut, it would hold the one slot for ever.

    The run that continues it has its parameters. Runs of other origin are left alone, and a run
    that lived on would keep its slot. MLflow has no part in it and takes long to start.
    """
    deployment = registered(stack)
    next_year = (datetime.now(UTC) + timedelta(days=365)).isoformat()
    later = {"type": "SCHEDULED", "state_details": {"scheduled_time": next_year}}
    asked = {"state": later, "parameters": {"nightly": True}}
    killed = _start_at(stack, f"deployments/{deployment['id']}/create_flow_run", asked)
    other = _start_at(stack, "flow_runs/", {"flow_id": deployment["flow_id"], "state": later})
    limits = f"{stack.layout().url('prefect')}/api/v2/concurrency_limits"
    assert json_of(stack, f"{limits}/", {"name": f"slot {spared}", "limit": 1})
    slot = {"names": [f"slot {spared}"], "slots": 1, "mode": "concurrency", "lease_duration": 300}
    lease = json_of(stack, f"{limits}/increment-with-lease", slot)["lease_id"]
    everything = [
        process
        for process in find_marked(stack.root)
        if not spared or process.environ().get(SERVICE_MARK) != spared
    ]
    for process in everything:
        process.kill()
    psutil.wait_procs(everything, timeout=30)
    assert stack.up().up
    limits = f"{stack.layout().url('prefect')}/api/v2/concurrency_limits"  # on another port, maybe
    renewal = {"lease_duration": 300}
    assert text_of(stack, f"{limits}/leases/{lease}/renew", renewal, "POST") is not None
    api = f"{stack.layout().url('prefect')}/api/flow_runs"
    assert json_of(stack, f"{api}/{killed}")["state_type"] == "CRASHED"
    assert json_of(stack, f"{api}/{other}")["state_type"] == "RUNNING"
    again = _wait_for_resumption(stack, api, killed)
    assert again["parameters"] == {
        "config": deployment["parameters"]["config"],
        "continue_run": killed,
        "nightly": True,
        "resumed": 1,
    }


def test_a_run_that_was_continued_is_followed_to_its_result(stack: Stack) -> None:
    """By its own id, also once the flow run that continued it has ended."""
    from flows.cli.follow import find_run

    deployment = registered(stack)
    ids = []
    for state in (
        {"type": "FAILED"},  # not crashed, or the deployment's automation would continue it as well
        {"type": "COMPLETED", "name": "Promoted"},
        {"type": "COMPLETED", "name": ALREADY_DONE},
    ):
        given = {"continue_run": ids[0]} if ids else {}
        # Made as it ended: the worker would start one that is made first and ended then.
        asked = {"parameters": given, "state": state}
        address = f"deployments/{deployment['id']}/create_flow_run"
        ids.append(send(stack.layout(), address, asked)["id"])
    assert find_run(stack.layout(), ids[0])["id"] == ids[1]


def _stuck_run(stack: Stack, state: str) -> str:
    """Make a run of the deployment that the server believes to be in `state`; return its id."""
    deployment = registered(stack)
    later = {"scheduled_time": (datetime.now(UTC) + timedelta(days=365)).isoformat()}
    asked = {"state": {"type": "SCHEDULED", "state_details": later}}
    run = _start_at(stack, f"deployments/{deployment['id']}/create_flow_run", asked)
    if state != "RUNNING":
        forced = {"state": {"type": state}, "force": True}
        send(stack.layout(), f"flow_runs/{run}/set_state", forced)
    return run


def _state_of(stack: Stack, run: str) -> str:
    return str(send(stack.layout(), f"flow_runs/{run}", method="GET")["state_type"])


def test_a_run_whose_process_ended_without_reporting_is_found_by_the_second_look(
    stack: Stack,
) -> None:
    """It is continued once, if it has begun; one that was being cancelled is cancelled.

    Others are left alone.
    """
    deploy(stack)
    layout, sweep = stack.layout(), OrphanSweep()
    runs = {state: _stuck_run(stack, state) for state in ("RUNNING", "PENDING", "CANCELLING")}
    starting, unbegun = _stuck_run(stack, "PENDING"), _stuck_run(stack, "RUNNING")
    begin(stack, unbegun).unlink()
    sweep.repeat(layout, {starting})
    assert {state: _state_of(stack, run) for state, run in runs.items()} == {s: s for s in runs}
    sweep.repeat(layout, {starting})
    assert [_state_of(stack, run) for run in runs.values()] == ["CRASHED", "CRASHED", "CANCELLED"]
    assert (_state_of(stack, starting), _state_of(stack, unbegun)) == ("PENDING", "CRASHED")
    continued = {run["parameters"].get("continue_run") for run in send(layout, RUNS, {})}
    assert continued & set(runs.values()) == {runs["RUNNING"], runs["PENDING"]}
    send(layout, f"flow_runs/{starting}", method="DELETE")


@pytest.mark.slow
@pytest.mark.timeout(400)
def test_a_slot_that_a_lost_run_holds_is_free_within_two_minutes(stack: Stack) -> None:
    """The stack's worker finds the run by itself; the next run waits for nothing else."""
    stack.up()
    deploy(stack)
    pause(stack, is_paused=False)
    _stuck_run(stack, "PENDING")
    deployment = registered(stack)
    created = f"deployments/{deployment['id']}/create_flow_run"
    following = send(stack.layout(), created, {})["id"]
    end = time.monotonic() + 120
    while _state_of(stack, following) != "COMPLETED":
        assert time.monotonic() < end, "the slot is still held"
        time.sleep(1)
    pause(stack, is_paused=True)


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_servers_from_before_the_secret_or_with_an_older_one_are_started_anew(stack: Stack) -> None:
    """A run in progress on them is taken up; `up` alone does all of it."""
    stack.up()
    deploy(stack)
    running, before, old = (
        _stuck_run(stack, "RUNNING"),
        _pids(stack.status()),
        stack.layout().secret,
    )
    (stack.root / ".qwen3ft" / "secret").unlink()
    assert stack.up().up
    after = _pids(stack.status())
    assert all(after[name] != before[name] for name in SERVICES)
    assert stack.layout().secret not in ("", old)
    assert _state_of(stack, running) == "CRASHED"
    _wait_for_resumption(stack, f"{stack.layout().url('prefect')}/api/flow_runs", running)


def test_the_schedule_is_changed_on_the_server_and_stays_when_registered_again(
    stack: Stack, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """No tracked file is edited, and an upgrade ends nobody's nightly runs.

    The command says what the server has, the server plans the nights, and no automation is doubled.
    """
    from flows.cli.servers import schedule_command

    monkeypatch.chdir(stack.root)
    before = (stack.root / PREFECT_FILE).read_text()
    schedule_command("30 1 * * 1-5", "Asia/Shanghai", active=True)
    shown = 'nightly  cron "30 1 * * 1-5", time zone Asia/Shanghai: on\n'
    assert capsys.readouterr().out == shown
    assert deploy(stack, force=True) is True
    assert stack.status().schedule_active
    schedule_command(None, None, active=None)
    assert capsys.readouterr().out == shown
    _wait_for_planned_runs(stack, "17:30")  # in UTC
    automations = send(stack.layout(), "automations/filter", {})
    names = [RESUME_AUTOMATION, ZOMBIE_AUTOMATION, "qwen3ft: new data"]
    assert sorted(item["name"] for item in automations) == sorted(names)
    found = read_deployment(stack.layout())
    assert found is not None
    [schedule] = found["schedules"]
    assert schedule["active"]
    assert schedule["schedule"]["cron"] == "30 1 * * 1-5"
    assert schedule["schedule"]["timezone"] == "Asia/Shanghai"
    assert deploy(stack) is False
    assert (stack.root / PREFECT_FILE).read_text() == before
    schedule_command(active=False)
    assert capsys.readouterr().out == shown.replace(": on", ": off")
    assert not stack.status().schedule_active
    # what the deployment's page can make of it
    address = f"deployments/{found['id']}/schedules/{schedule['id']}"
    send(stack.layout(), address, {"active": True, "schedule": {"interval": 3600}}, "PATCH")
    schedule_command()
    assert "an interval or RRule (--cron replaces it), time zone UTC: on" in capsys.readouterr().out
    schedule_command("30 1 * * 1-5", "Asia/Shanghai")
    assert capsys.readouterr().out == shown
    schedule_command(active=False)


@pytest.mark.slow  # registers three times
def test_a_registration_that_breaks_off_keeps_the_schedule(
    stack: Stack, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The next one finishes it."""
    deploy(stack, force=True)
    change_schedule(stack, cron="30 1 * * 1-5", timezone="Asia/Shanghai", active=True)
    with monkeypatch.context() as patch:
        patch.setattr("deployments.deploy._finish_registration", lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            deploy(stack, force=True)
    wanted = Schedule(cron="30 1 * * 1-5", timezone="Asia/Shanghai", active=True)
    assert read_schedule(stack) == wanted
    assert deploy(stack) is True
    assert read_schedule(stack) == wanted
    change_schedule(stack, active=False)


def test_old_flow_runs_are_counted_by_a_dry_run_and_removed_without_one(
    stack: Stack, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A run that has not ended stays, however old it is."""
    from flows.cli.clean import clean_command

    monkeypatch.chdir(stack.root)
    deployment = registered(stack)
    api = f"{stack.layout().url('prefect')}/api/flow_runs"
    ended = json_of(stack, f"{api}/", {"flow_id": deployment["flow_id"]})["id"]
    for state in ("RUNNING", "COMPLETED"):
        forced = {"state": {"type": state}, "force": True}
        assert text_of(stack, f"{api}/{ended}/set_state", forced) is not None
    going = _start_at(stack, "flow_runs/", {"flow_id": deployment["flow_id"]})

    def clean(*, dry_run: bool) -> int:
        environment = dict(os.environ)  # the command points its own process at the servers
        clean_command(keep_days=0, dry_run=dry_run, as_json=True)
        os.environ.clear()
        os.environ.update(environment)
        return int(json.loads(capsys.readouterr().out)["flow_runs"])

    counted = clean(dry_run=True)
    assert counted >= 1
    assert json_of(stack, f"{api}/{ended}") is not None
    assert clean(dry_run=False) >= counted
    assert json_of(stack, f"{api}/{ended}") is None
    assert json_of(stack, f"{api}/{going}") is not None


def test_down_leaves_no_process(stack: Stack) -> None:
    """Even one that a run left behind is gone; ports and data are kept for the next `up`."""
    layout = stack.layout()
    stray = start_detached(
        [sys.executable, "-c", "import time; time.sleep(600)"],
        environment={**os.environ, MARK: str(stack.root)},
        folder=stack.root,
        log=stack.root / "stray.log",
    )
    assert set(stack.down()) == set(SERVICES)
    assert find_marked(stack.root) == []
    assert stray.find() is None
    left = (stack.root / "prefect.toml").read_text(encoding="utf-8")
    assert layout.secret not in left
    assert tomllib.loads(left) == {"server": {"ephemeral": {"enabled": False}}}
    assert stack.layout() == layout
    assert stack.down() == ()
    assert all(layout.log(name).exists() for name in SERVICES)


# --- the parts, without servers ---


@pytest.mark.parametrize(("cron", "zone"), [("0 2 * *", "UTC"), ("0 2 * * *", "Europe/Nowhere")])
def test_an_invalid_schedule_changes_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, cron: str, zone: str
) -> None:
    """It is refused before the file is changed and before anything is started."""
    from flows.cli.servers import schedule_command

    (tmp_path / "deployments").mkdir()
    shutil.copy(ROOT / PREFECT_FILE, tmp_path / PREFECT_FILE)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ConfigError, match="not a valid schedule"):
        schedule_command(cron, zone, active=None)
    assert (tmp_path / PREFECT_FILE).read_text() == (ROOT / PREFECT_FILE).read_text()
    assert not (tmp_path / ".qwen3ft").exists()


def test_a_killed_run_is_noticed_within_two_minutes() -> None:
    """The silence that the server waits for, and 10 s for its own polling, are less than that."""
    assert SILENT_SECONDS + 10 <= 120


def test_a_port_in_use_is_skipped() -> None:
    """That holds also if its owner listens on all addresses."""
    with socket.socket() as holder:
        holder.bind(("0.0.0.0", 0))
        holder.listen()
        port = holder.getsockname()[1]
        assert free_port(port) > port
        assert free_port(port, taken=[port + 1]) > port + 1


def test_a_stack_that_is_down_goes_back_to_its_ports_once_they_are_free(tmp_path: Path) -> None:
    """One that is partly up keeps those that its runs know; both are said where a port changes."""
    with socket.socket() as holder:
        holder.bind(("127.0.0.1", 0))
        holder.listen()
        wanted = holder.getsockname()[1]
        stack, said = Stack(tmp_path, {"prefect": wanted, "mlflow": wanted + 500}), []
        (tmp_path / ".qwen3ft").mkdir()
        taken = stack._choose_port("prefect", said.append, may_move=True)
        assert taken.prefect_port > wanted
        assert said.pop() == f"Port {wanted} is taken; prefect uses {taken.prefect_port}."
        stack._write_state(taken)
    kept = stack._choose_port("prefect", said.append, may_move=False)
    assert (kept.prefect_port, said) == (taken.prefect_port, [])
    assert stack._choose_port("prefect", said.append, may_move=True).prefect_port == wanted
    [line] = said
    assert line == f"Port {wanted} is free again; prefect uses it instead of {taken.prefect_port}."


def test_a_process_that_ignores_sigterm_is_killed_with_its_children(tmp_path: Path) -> None:
    """Stopping takes a bounded time."""
    code = (
        "import signal, subprocess, sys, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); "
        "subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(600)']); "
        "print('ready', flush=True); time.sleep(600)"
    )
    log = tmp_path / "log"
    mark = start_detached(
        [sys.executable, "-c", code], environment=os.environ, folder=tmp_path, log=log
    )
    while "ready" not in log.read_text():
        time.sleep(0.05)
    process = mark.find()
    assert process is not None
    children = process.children()
    assert stop([process], seconds=0.5) == 2
    assert mark.find() is None
    assert not any(child.is_running() and child.status() != "zombie" for child in children)


def test_variables_of_the_shell_do_not_affect_the_stack(tmp_path: Path) -> None:
    """An exported address or key of another server is dropped; everything else is passed on."""
    exported = {"PREFECT_API_URL": "https://x", "PREFECT_API_KEY": "k", "HF_HOME": "/hf"}
    exported["PYTHONDONTWRITEBYTECODE"] = "1"
    values = services.environment(Layout(tmp_path, 1, 2), exported)
    assert values["PREFECT_API_URL"] == "http://127.0.0.1:1/api"
    assert not {"PREFECT_API_KEY", "PYTHONDONTWRITEBYTECODE"} & set(values)
    assert values["HF_HOME"] == "/hf"
    assert values["DO_NOT_TRACK"] == "true"


def test_prefect_typed_while_the_stack_is_down_starts_no_server(tmp_path: Path) -> None:
    """Prefect's own, by its default profile, would be open to every page and user."""
    project, home = tmp_path / "project", tmp_path / "home"
    (project / ".qwen3ft").mkdir(parents=True)
    home.mkdir()
    Stack(project).down()
    kept = {name: text for name, text in os.environ.items() if not name.startswith("PREFECT_")}
    done = subprocess.run(
        [sys.executable, "-m", "prefect", "deployment", "ls"],
        cwd=project,
        env={**kept, "HOME": str(home), "DO_NOT_TRACK": "1", "COLUMNS": "200"},
        capture_output=True,
        text=True,
    )
    assert done.returncode != 0
    assert "No Prefect API URL" in done.stdout + done.stderr
    assert "qwen3ft up" in (project / "prefect.toml").read_text(encoding="utf-8")


def test_the_users_own_prefect_toml_is_left_alone(tmp_path: Path) -> None:
    """`down` replaces only the file that `up` wrote."""
    own = tmp_path / "prefect.toml"
    own.write_text("[api]\nurl = 'http://elsewhere'\n")
    (tmp_path / ".qwen3ft").mkdir()
    Stack(tmp_path).down()
    assert own.exists()


@pytest.mark.parametrize(
    ("prefect", "answered", "message"),
    [("false", 1, "prefect deploy ended with exit code 1"), ("true", 2, "does not answer")],
)
def test_a_registration_says_that_the_schedules_could_not_be_set_back(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, prefect: str, answered: int, message: str
) -> None:
    """The server has ended, before or after the registration; the error is the first one."""
    registered = {"version": "old", "parameter_openapi_schema": {}, "schedules": []}
    answers = iter([registered] * answered)

    def read(_: Layout) -> dict[str, Any]:
        if found := next(answers, None):
            return found
        raise EnvironmentNotReadyError("The Prefect server does not answer.")

    monkeypatch.setattr("deployments.deploy.read_deployment", read)
    monkeypatch.setattr(EnvironmentManager, "get_python_executable", lambda _: prefect)
    said: list[str] = []
    with pytest.raises(EnvironmentNotReadyError, match=message):
        deploy(Stack(tmp_path), said.append)
    assert said[-1] == "The schedules could not be set back: look at qwen3ft schedule."
