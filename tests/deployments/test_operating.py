"""Nights, crashes and restarts on real servers with a real worker, but without training."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from datetime import UTC, datetime, timedelta
from functools import partial
from pathlib import Path
from typing import Any
from uuid import uuid4

import psutil
import pytest

from deployments import services
from deployments.automations import SILENT_SECONDS
from deployments.autostart import unit_name, write_unit
from deployments.deploy import deploy
from deployments.prefect_api import read_deployment, send
from deployments.processes import find_marked
from deployments.stack import Stack

ROOT = Path(__file__).parents[2]
NOTICED_SECONDS = 120.0

pytestmark = pytest.mark.timeout(600)

FLOW = '''
"""The nightly logic of the real flow, around a training that is a line in a file."""

import json
import time
from pathlib import Path

from prefect import flow, get_run_logger
from prefect.runtime import flow_run

from flows.nightly import end_as_taken, is_nightly, claim_tonight
from flows.run_context import survive_closed_pipes
from flows.resume import refuse_second_resume, cancel_duplicate_resumes
from qwen3ft.config import TrainingConfig
from qwen3ft.operations.night import NightRequest


@flow(name="qwen3-finetune")
def qwen3_finetune(
    config: TrainingConfig = TrainingConfig(),
    continue_run: str | None = None,
    nightly: bool = False,
    resumed: int = 0,
):
    survive_closed_pipes()
    refuse_second_resume(config, continue_run, resumed)
    cancel_duplicate_resumes(continue_run, resumed)
    request = NightRequest(sha256=Path("data").read_text(), settings_sha256="", files=1)
    with claim_tonight(config, request, is_nightly(asked=nightly), continue_run) as night:
        if night.taken is not None:
            return end_as_taken(night, config.model_name)
        Path("runs", night.run_id).mkdir(parents=True, exist_ok=True)
        Path("runs", night.run_id, "config.json").touch()
        with Path("trained.jsonl").open("a") as stream:
            stream.write(json.dumps([night.run_id, str(flow_run.id), resumed]) + "\\n")
        while Path("hang").exists():
            get_run_logger().info("training")
            time.sleep(0.2)
        night.settle("kept")
'''


class Project:
    """A project folder whose stack is up and whose deployment is registered."""

    def __init__(self, root: Path) -> None:
        shutil.copytree(ROOT / "deployments" / "configs", root / "deployments" / "configs")
        entry = ("qwen3ft.entry_points.qwen3_finetune ", "flows/finetune.py:qwen3_finetune ")
        text = (ROOT / "deployments" / "prefect.yaml").read_text().replace(*entry)
        (root / "deployments" / "prefect.yaml").write_text(text)  # with the flow of this project
        (root / "flows").mkdir()
        (root / "flows" / "finetune.py").write_text(FLOW)
        self.root = root
        self.stack = Stack(root, {"prefect": 4800, "mlflow": 5800})
        self.data("a" * 64)

    def data(self, content: str) -> None:
        """Replace the data to train on."""
        (self.root / "data").write_text(content)

    def start(self, **parameters: Any) -> str:
        """Start a run of the deployment; return its id."""
        return self._create({"parameters": parameters})

    def start_scheduled(self, at: datetime) -> str:
        """Make a run as Prefect's scheduler does; return its id."""
        state = {"type": "SCHEDULED", "state_details": {"scheduled_time": at.isoformat()}}
        return self._create({"state": state, "tags": ["auto-scheduled"]})

    def _create(self, body: dict[str, Any]) -> str:
        deployment = read_deployment(self.stack.layout())
        assert deployment is not None
        address = f"deployments/{deployment['id']}/create_flow_run"
        return str(send(self.stack.layout(), address, body)["id"])

    def read(self, run: str) -> dict[str, Any]:
        """Return the server's record of a run."""
        found: dict[str, Any] = send(self.stack.layout(), f"flow_runs/{run}", method="GET")
        return found

    def runs(self) -> list[dict[str, Any]]:
        """Return every run that the server knows."""
        found: list[dict[str, Any]] = send(self.stack.layout(), "flow_runs/filter", {})
        return found

    def trained(self) -> list[list[Any]]:
        """Return (run folder, flow run, times resumed) of each training that began."""
        path = self.root / "trained.jsonl"
        return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []

    def pid(self, service: str) -> int:
        """Return the pid of a service."""
        (found,) = [item for item in self.stack.status().services if item.name == service]
        assert found.pid is not None
        return found.pid


def wait_for(condition: Callable[[], Any], seconds: float) -> Any:
    """Return what `condition` returns once that is true."""
    end = time.monotonic() + seconds
    while not (found := condition()):
        assert time.monotonic() < end, f"not within {seconds:.0f} s"
        time.sleep(0.25)
    return found


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Project]:
    """Start one stack for the module."""
    made = Project(tmp_path_factory.mktemp("operating"))
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("CUDA_VISIBLE_DEVICES", "")
        try:
            made.stack.up()
            deploy(made.stack)
            yield made
        finally:
            made.stack.down()


def ended(project: Project, run: str) -> dict[str, Any]:
    """Wait for a run's end; return its record."""

    def record() -> dict[str, Any] | None:
        found = project.read(run)
        return found if found["state_type"] in ("COMPLETED", "FAILED", "CRASHED") else None

    found: dict[str, Any] = wait_for(record, 180)
    return found


def _runs_but(project: Project, known: set[str]) -> list[dict[str, Any]]:
    return [run for run in project.runs() if run["id"] not in known]


def _trainings_of(project: Project, flow_runs: set[str]) -> list[list[Any]]:
    return [row for row in project.trained() if row[1] in flow_runs]


def _trainings(project: Project, run: str, resumed: int) -> list[list[Any]]:
    return [row for row in project.trained() if row[0] == run and row[2] == resumed]


@pytest.mark.slow
def test_three_missed_nights_are_caught_up_once(project: Project) -> None:
    """The worker finds all three late; the run that it starts first does the newest night."""
    before, now = len(project.trained()), datetime.now(UTC)
    nights = [project.start_scheduled(now - timedelta(days=days)) for days in (3, 2, 1)]
    names = sorted(ended(project, run)["state_name"] for run in nights)
    assert names == ["Already done", "Already done", "Completed"]
    assert len(project.trained()) == before + 1
    [record] = (project.root / "runs" / ".nights").glob("*.json")
    assert record.name.startswith(f"{now - timedelta(days=1):%Y-%m-%d}")


@pytest.mark.slow
def test_new_data_starts_a_night_by_an_event(project: Project) -> None:
    """The event is emitted as the docs say; without new data, a second one starts no training."""
    project.data("b" * 64)
    command = [sys.executable, "-m", "prefect", "event", "emit", "qwen3ft.data.arrived"]
    before = len(project.trained())
    for expected in ("Completed", "Already done"):
        known = {run["id"] for run in project.runs()}
        subprocess.run(
            [*command, "--resource-id", "qwen3ft.data"],
            env=services.environment(project.stack.layout()),
            check=True,
            stdout=subprocess.DEVNULL,
        )
        new = wait_for(partial(_runs_but, project, known), 120)
        assert new[0]["parameters"]["nightly"] is True
        assert ended(project, new[0]["id"])["state_name"] == expected
    assert len(project.trained()) == before + 1


@pytest.fixture
def hang(project: Project) -> Iterator[Path]:
    """Make the file that keeps a training from ending."""
    path = project.root / "hang"
    path.touch()
    yield path
    path.unlink(missing_ok=True)


@pytest.mark.slow
def test_two_runs_never_overlap(project: Project, hang: Path) -> None:
    """The second waits until the first has ended."""
    project.data("c" * 64)
    first, second = project.start(), project.start()
    wait_for(lambda: len(_trainings_of(project, {first, second})) == 1, 180)
    time.sleep(10)  # the worker polls five times
    assert len(_trainings_of(project, {first, second})) == 1
    hang.unlink()
    records = [ended(project, run) for run in (first, second)]
    early, late = sorted(records, key=lambda record: str(record["start_time"]))
    assert late["start_time"] >= early["end_time"]


@pytest.mark.slow
def test_a_run_killed_with_its_worker_is_noticed_and_continued_once(
    project: Project, hang: Path, record_property: Callable[[str, object], None]
) -> None:
    """The server notices without `up`; the next worker finds the run that continues it."""
    project.data("d" * 64)
    run = project.start(nightly=True)
    wait_for(lambda: _trainings_of(project, {run}), 180)
    time.sleep(services.HEARTBEAT_SECONDS / 2)  # on average a crash is half a beat after one
    killed = time.monotonic()
    for process in find_marked(project.root, "worker"):
        process.kill()
    wait_for(lambda: project.read(run)["state_type"] == "CRASHED", NOTICED_SECONDS)
    noticed_seconds = time.monotonic() - killed
    record_property("noticed_seconds", round(noticed_seconds, 1))
    sys.stderr.write(f"noticed after {noticed_seconds:.0f} s, {SILENT_SECONDS} s of silence\n")
    hang.unlink()
    project.stack.up()
    [again] = wait_for(partial(_trainings, project, run, 1), 180)
    assert ended(project, again[1])["state_name"] == "Completed"
    assert [row[2] for row in project.trained() if row[0] == run] == [0, 1]


@pytest.mark.slow
def test_a_run_outlives_prefects_worker(project: Project, hang: Path) -> None:
    """A run goes on when its worker is killed, and the next worker leaves it alone."""
    project.data("f" * 64)
    run = project.start()
    wait_for(lambda: _trainings_of(project, {run}), 180)
    psutil.Process(project.pid("worker")).kill()
    time.sleep(2)  # it logs ten lines that nobody reads
    assert project.stack.up().up
    time.sleep(5)  # the new worker polls twice
    assert project.read(run)["state_type"] == "RUNNING"
    hang.unlink()
    assert ended(project, run)["state_name"] == "Completed"
    assert [row[2] for row in project.trained() if row[0] == run] == [0]


@pytest.mark.slow
def test_of_several_runs_that_continue_a_crash_one_starts(project: Project) -> None:
    """A server that evaluates a crash more than once starts several."""
    project.data("0" * 64)
    twins = [project.start(continue_run=str(uuid4()), resumed=1)]
    parameters = project.read(twins[0])["parameters"]
    twins += [project.start(**parameters) for _ in range(3)]
    records = [ended(project, run) for run in twins]
    assert sorted(record["state_name"] for record in records) == [
        *("Already done", "Already done", "Already done", "Completed")
    ]
    assert sum(record["run_count"] for record in records) == 1


@pytest.mark.slow
def test_a_run_that_crashes_again_is_left_to_a_person(project: Project, hang: Path) -> None:
    """Killed, continued, killed: the third start fails with the command that continues it."""
    project.data("e" * 64)
    run = project.start()
    for resumed in (0, 1):
        [row] = wait_for(partial(_trainings, project, run, resumed), 180)
        killed = [process for process in find_marked(project.root) if _executes(process, row[1])]
        assert killed
        for process in killed:
            process.kill()
    [third] = wait_for(
        lambda: [item for item in project.runs() if item["parameters"].get("resumed") == 2], 180
    )
    record = ended(project, third["id"])
    assert record["state_type"] == "FAILED"
    assert f"qwen3ft run --resume {run}" in record["state"]["message"]


def _executes(process: psutil.Process, flow_run: str) -> bool:
    try:
        return process.environ().get("PREFECT__FLOW_RUN_ID") == flow_run
    except psutil.Error:
        return False


@pytest.mark.slow
def test_a_supervised_stack_gets_its_worker_back_until_it_is_stopped(
    project: Project,
) -> None:
    """It runs as under the systemd unit; SIGTERM ends all of it."""
    code = (
        "import sys; from pathlib import Path; from deployments.stack import Stack; "
        "from deployments.autostart import stay_up; stay_up(Stack(Path(sys.argv[1])), print)"
    )
    keeper = subprocess.Popen([sys.executable, "-c", code, str(project.root)], cwd=ROOT)
    time.sleep(5)
    before = project.pid("worker")
    os.kill(before, signal.SIGKILL)
    wait_for(lambda: project.stack.status().up and project.pid("worker") != before, 90)
    keeper.terminate()
    assert keeper.wait(timeout=90) == 0
    assert find_marked(project.root) == []
    project.stack.up()


def test_the_unit_is_one_that_systemd_accepts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """That holds for a folder with a space and a percent sign; nothing is started."""
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "config"))
    root = tmp_path / "my 100% project"
    (root / ".venv" / "bin").mkdir(parents=True)
    (root / ".venv" / "bin" / "python").symlink_to(sys.executable)
    path = write_unit(root)
    assert path == tmp_path / "config" / "systemd" / "user" / unit_name(root)
    assert unit_name(root) == "qwen3ft-my-100-project.service"
    text = path.read_text()
    assert f"WorkingDirectory={tmp_path}/my 100%% project\n" in text
    if shutil.which("systemd-analyze"):
        done = subprocess.run(
            ["systemd-analyze", "--user", "verify", str(path)], capture_output=True, text=True
        )
        complaints = [line for line in done.stderr.splitlines() if path.name in line]
        assert complaints == []
