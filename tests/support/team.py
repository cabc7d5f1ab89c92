"""The servers of a team as docs/operating.md sets them up: one PostgreSQL, a password on each."""

from __future__ import annotations

import base64
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil
import pytest

from deployments.processes import free_port, stop

ROOT = Path(__file__).parents[2]
USER, PASSWORD = "team", "a-long-password"
START_SECONDS = 120.0
LOOPBACK = "127.0.0.1"


def _find_binaries() -> Path | None:
    found = sorted(Path("/usr/lib/postgresql").glob("*/bin/initdb"))
    which = shutil.which("initdb")
    return found[-1].parent if found else Path(which).parent if which else None


BINARIES = _find_binaries()
needs_postgres = pytest.mark.skipif(
    BINARIES is None, reason="PostgreSQL is not installed: no initdb"
)


@dataclass
class Team:
    """Addresses, and the processes behind them."""

    root: Path
    ports: dict[str, int]
    address: str = LOOPBACK
    """Where both servers are reached."""
    environment: dict[str, str] = field(default_factory=dict)
    """Variables of a machine that trains."""
    processes: list[subprocess.Popen[bytes]] = field(default_factory=list)

    @property
    def project(self) -> Path:
        """The project folder of a machine that trains."""
        return self.root / "project"

    def database(self, name: str, driver: str) -> str:
        """Return the address of a database."""
        return f"postgresql+{driver}://{USER}:{PASSWORD}@{LOOPBACK}:{self.ports['postgres']}/{name}"

    def url(self, server: str) -> str:
        """Return the address of a server."""
        return f"http://{self.address}:{self.ports[server]}"

    def start(self, *command: str, **options: Any) -> subprocess.Popen[bytes]:
        """Start a process that ends with the test."""
        log = (self.root / f"{len(self.processes)}.log").open("wb")
        process = subprocess.Popen(
            command, stdout=log, stderr=subprocess.STDOUT, start_new_session=True, **options
        )
        self.processes.append(process)
        return process

    def run(self, *arguments: str) -> str:
        """Run a `prefect` command as on the machine that trains; return its output."""
        done = subprocess.run(
            [sys.executable, "-m", "prefect", "--no-prompt", *arguments],
            cwd=self.project,
            env=self.environment,
            capture_output=True,
            text=True,
        )
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    def get(
        self, server: str, path: str, body: Any = None, *, password: str | None = PASSWORD
    ) -> Any:
        """Return a server's answer to a request with or without a password and a body."""
        request = urllib.request.Request(f"{self.url(server)}{path}")
        if body is not None:
            request.data = json.dumps(body).encode()
            request.add_header("Content-Type", "application/json")
        if password is not None:
            token = base64.b64encode(f"{USER}:{password}".encode()).decode()
            request.add_header("Authorization", f"Basic {token}")
        opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
        with opener.open(request, timeout=15) as response:
            return json.loads(response.read())

    def connect(self, database: str = "postgres") -> Any:
        """Return a connection to a database, once PostgreSQL answers."""
        import psycopg

        end = time.monotonic() + START_SECONDS
        address = self.database(database, "psycopg").replace("+psycopg", "")
        while True:
            try:
                return psycopg.connect(address, autocommit=True)
            except psycopg.OperationalError:
                assert time.monotonic() < end, self.logs()
                time.sleep(0.2)

    def logs(self) -> str:
        """Return the end of what every process printed."""
        found = sorted(self.root.glob("*.log"), key=lambda path: int(path.stem))
        return "\n".join(f"--- {path.name}\n{path.read_text()[-4000:]}" for path in found)


@contextmanager
def started_team(
    address: str = LOOPBACK,
    artifacts: str | None = None,
    variables: dict[str, str] | None = None,
) -> Iterator[Team]:
    """Start both servers on one PostgreSQL, and make a project folder.

    Args:
        address: Where both listen.
        artifacts: Where MLflow keeps artifacts; a folder by default.
        variables: More variables for MLflow's server.
    """
    root = Path(tempfile.mkdtemp(prefix="qwen3ft-team-"))
    ports: dict[str, int] = {}
    for name, preferred in (("postgres", 5470), ("prefect", 4270), ("mlflow", 5070)):
        ports[name] = free_port(preferred, taken=ports.values())
    team = Team(root, ports, address)
    shutil.copytree(ROOT / "deployments" / "configs", team.project / "deployments" / "configs")
    shutil.copy(ROOT / "deployments" / "prefect.yaml", team.project / "deployments")
    (team.project / "flows").symlink_to(ROOT / "flows")
    try:
        _start_postgres(team)
        with team.connect() as connection:
            for name in ("prefect", "mlflow", "mlflow_auth"):
                connection.execute(f"CREATE DATABASE {name}")
        _start_servers(team, artifacts or str(root / "artifacts"), variables or {})
        _wait_for(team, "prefect", "/api/health")
        _wait_for(team, "mlflow", "/api/2.0/mlflow/experiments/search?max_results=1")
        yield team
    finally:
        for process in reversed(team.processes):  # PostgreSQL last
            if process.poll() is None:
                stop([psutil.Process(process.pid)])
            process.wait()
        shutil.rmtree(root, ignore_errors=True)


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
    team.start(str(BINARIES / "postgres"), "-D", str(data), *port, "-h", LOOPBACK, **options)


def _start_servers(team: Team, artifacts: str, variables: dict[str, str]) -> None:
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
    port = ("--host", team.address, "--port")
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
        **variables,
    }
    server = (sys.executable, "-m", "mlflow", "server", "--app-name", "basic-auth")
    stores = (
        *("--backend-store-uri", team.database("mlflow", "psycopg")),
        *("--artifacts-destination", artifacts, "--workers", "1"),
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
            pytest.fail(f"{server}: {problem}\n{team.logs()}")
        time.sleep(0.5)
