"""The set-up for a team in docs/operating.md: PostgreSQL, and passwords on both servers.

PostgreSQL (Debian: apt install postgresql), Prefect and MLflow are real; a worker that has only
addresses and passwords carries out a whole run.
"""

from __future__ import annotations

import base64
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from deployments.processes import free_port
from qwen3ft.records.run_card import COMPLETED_STATES

ROOT = Path(__file__).parents[2]
USER, PASSWORD = "team", "a-long-password"
START_SECONDS = 120.0


def _find_binaries() -> Path | None:
    found = sorted(Path("/usr/lib/postgresql").glob("*/bin/initdb"))
    which = shutil.which("initdb")
    return found[-1].parent if found else Path(which).parent if which else None


BINARIES = _find_binaries()
pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(900),
    pytest.mark.skipif(BINARIES is None, reason="PostgreSQL is not installed: no initdb"),
]


@dataclass
class Team:
    """Addresses, and the processes behind them."""

    root: Path
    ports: dict[str, int]
    environment: dict[str, str] = field(default_factory=dict)
    processes: list[subprocess.Popen[bytes]] = field(default_factory=list)

    def database(self, name: str, driver: str) -> str:
        """Return the address of a database."""
        return f"postgresql+{driver}://{USER}:{PASSWORD}@127.0.0.1:{self.ports['postgres']}/{name}"

    def url(self, server: str) -> str:
        """Return the address of a server."""
        return f"http://127.0.0.1:{self.ports[server]}"

    def start(self, *command: str, **options: Any) -> None:
        """Start a process that ends with the test."""
        log = (self.root / f"{len(self.processes)}.log").open("wb")
        process = subprocess.Popen(
            command, stdout=log, stderr=subprocess.STDOUT, start_new_session=True, **options
        )
        self.processes.append(process)

    def run(self, *arguments: str) -> str:
        """Run a `prefect` command as on the machine that trains; return its output."""
        done = subprocess.run(
            [sys.executable, "-m", "prefect", "--no-prompt", *arguments],
            cwd=self.root / "project",
            env=self.environment,
            capture_output=True,
            text=True,
        )
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    def get(self, server: str, path: str, *, password: str | None = PASSWORD) -> Any:
        """Return a server's answer to a request with or without a password."""
        request = urllib.request.Request(f"{self.url(server)}{path}")
        if password is not None:
            token = base64.b64encode(f"{USER}:{password}".encode()).decode()
            request.add_header("Authorization", f"Basic {token}")
        opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
        with opener.open(request, timeout=15) as response:
            return json.loads(response.read())


def _start_postgres(team: Team) -> None:
    assert BINARIES is not None
    data, password = team.root / "data", team.root / "password"
    password.write_text(PASSWORD)
    options: dict[str, Any] = {"cwd": team.root}
    if os.getuid() == 0:  # PostgreSQL refuses to run as root
        shutil.chown(team.root, "postgres")
        shutil.chown(password, "postgres")
        options["user"] = "postgres"
    subprocess.run(
        [BINARIES / "initdb", "-D", data, "-U", USER, "-A", "scram-sha-256", "--pwfile", password],
        check=True,
        stdout=subprocess.DEVNULL,
        **options,
    )
    port = ("-p", str(team.ports["postgres"]), "-k", str(team.root))
    team.start(str(BINARIES / "postgres"), "-D", str(data), *port, "-h", "127.0.0.1", **options)


def _connect(team: Team, database: str = "postgres") -> Any:
    import psycopg

    end = time.monotonic() + START_SECONDS
    address = team.database(database, "psycopg").replace("+psycopg", "")
    while True:
        try:
            return psycopg.connect(address, autocommit=True)
        except psycopg.OperationalError:
            assert time.monotonic() < end, (team.root / "0.log").read_text()
            time.sleep(0.2)


def _start_servers(team: Team) -> None:
    """Start both as the docs say, except for the addresses."""
    inherited = {
        name: value
        for name, value in os.environ.items()
        if not name.startswith(("PREFECT_", "MLFLOW_"))
    }
    common = {**inherited, "DO_NOT_TRACK": "true", "MLFLOW_DISABLE_TELEMETRY": "true"}
    common["PREFECT_SERVER_ANALYTICS_ENABLED"] = "false"
    common["PREFECT_HOME"] = str(team.root / "prefect-home")
    prefect = {
        "PREFECT_API_DATABASE_CONNECTION_URL": team.database("prefect", "asyncpg"),
        "PREFECT_SERVER_API_AUTH_STRING": f"{USER}:{PASSWORD}",
    }
    port = ("--host", "127.0.0.1", "--port")
    server = (sys.executable, "-m", "prefect", "server", "start")
    team.start(*server, *port, str(team.ports["prefect"]), env=common | prefect)
    settings = team.root / "basic_auth.ini"
    settings.write_text(
        "[mlflow]\ndefault_permission = READ\n"
        f"database_uri = {team.database('mlflow_auth', 'psycopg')}\n"
        f"admin_username = {USER}\nadmin_password = {PASSWORD}\n"
        "authorization_function = mlflow.server.auth:authenticate_request_basic_auth\n"
    )
    mlflow = {
        "MLFLOW_AUTH_CONFIG_PATH": str(settings),
        "MLFLOW_FLASK_SERVER_SECRET_KEY": "one-random-text-for-all-its-workers",
        "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false",
    }
    server = (sys.executable, "-m", "mlflow", "server", "--app-name", "basic-auth")
    stores = (
        *("--backend-store-uri", team.database("mlflow", "psycopg")),
        *("--artifacts-destination", str(team.root / "artifacts"), "--workers", "1"),
    )
    team.start(*server, *stores, *port, str(team.ports["mlflow"]), env=common | mlflow)
    team.environment = common | {
        "PREFECT_API_URL": f"{team.url('prefect')}/api",
        "PREFECT_API_AUTH_STRING": f"{USER}:{PASSWORD}",
        "MLFLOW_TRACKING_URI": team.url("mlflow"),
        "MLFLOW_TRACKING_USERNAME": USER,
        "MLFLOW_TRACKING_PASSWORD": PASSWORD,
        "CUDA_VISIBLE_DEVICES": "",
    }


def _wait_for(team: Team, server: str, path: str) -> None:
    end = time.monotonic() + START_SECONDS
    while True:
        try:
            team.get(server, path)
            return
        except OSError as error:
            problem = str(error)
        if time.monotonic() > end:
            logs = "\n".join(path.read_text() for path in sorted(team.root.glob("*.log")))
            pytest.fail(f"{server}: {problem}\n{logs[-4000:]}")
        time.sleep(0.5)


@pytest.fixture(scope="module")
def team() -> Iterator[Team]:
    """Start both servers on one PostgreSQL, each with a password."""
    from deployments.processes import stop

    root = Path(tempfile.mkdtemp(prefix="qwen3ft-team-"))
    ports: dict[str, int] = {}
    for name, preferred in (("postgres", 5470), ("prefect", 4270), ("mlflow", 5070)):
        ports[name] = free_port(preferred, taken=ports.values())
    made = Team(root, ports)
    project = root / "project"
    shutil.copytree(ROOT / "deployments" / "configs", project / "deployments" / "configs")
    shutil.copy(ROOT / "deployments" / "prefect.yaml", project / "deployments")
    (project / "flows").symlink_to(ROOT / "flows")
    import psutil

    try:
        _start_postgres(made)
        with _connect(made) as connection:
            for name in ("prefect", "mlflow", "mlflow_auth"):
                connection.execute(f"CREATE DATABASE {name}")
        _start_servers(made)
        _wait_for(made, "prefect", "/api/health")
        _wait_for(made, "mlflow", "/api/2.0/mlflow/experiments/search?max_results=1")
        yield made
    finally:
        for process in reversed(made.processes):  # PostgreSQL last
            if process.poll() is None:
                stop([psutil.Process(process.pid)])
            process.wait()
        shutil.rmtree(root, ignore_errors=True)


@pytest.mark.parametrize(
    ("server", "path"),
    [
        ("prefect", "/api/work_pools/qwen3ft"),
        ("mlflow", "/api/2.0/mlflow/experiments/search?max_results=1"),
    ],
)
@pytest.mark.parametrize("password", [None, "a-wrong-password"])
def test_neither_server_answers_without_the_password(
    team: Team, server: str, path: str, password: str | None
) -> None:
    """Everything but Prefect's health check answers 401."""
    with pytest.raises(urllib.error.HTTPError, match="401"):
        team.get(server, path, password=password)


def test_a_machine_of_the_team_carries_out_a_whole_run(team: Team) -> None:
    """Every record of it is in PostgreSQL, and its adapter in MLflow."""
    team.run("work-pool", "create", "qwen3ft", "--type", "process")
    team.run("deploy", "--prefect-file", "deployments/prefect.yaml", "--all")
    command = [sys.executable, "-m", "prefect", "worker", "start", "--pool", "qwen3ft"]
    team.start(*command, cwd=team.root / "project", env=team.environment)
    small = {"max_steps": 6, "evaluate_every_steps": 2, "inference_rows": 24, "max_rows": 96}
    config = {"model_name": "embedded", "max_memory_gb": 4.0, "max_new_tokens": 24, **small}
    parameters = json.dumps({"config": config})
    team.run(
        *("deployment", "run", "qwen3-finetune/default", "--params", parameters),
        *("--watch", "--watch-timeout", "600"),
    )
    with _connect(team, "prefect") as connection:
        [(run, state)] = connection.execute("SELECT id, state_name FROM flow_run").fetchall()
    assert state in COMPLETED_STATES
    with _connect(team, "mlflow") as connection:
        status = connection.execute(
            "SELECT r.status FROM runs r JOIN tags t ON r.run_uuid = t.run_uuid"
            " WHERE t.key = 'prefect.flow_run_id' AND t.value = %s",
            [str(run)],
        ).fetchall()
        versions = connection.execute("SELECT name, version FROM model_versions").fetchall()
    assert status == [("FINISHED",)]
    assert versions == [("qwen3ft-embedded", 1)]
    assert list((team.root / "artifacts").rglob("adapter_model.safetensors"))
