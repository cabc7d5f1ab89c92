"""The three local services: their commands, environments, addresses and health checks.

Everything is derived from the project folder and two ports, and nothing is started here. All
services listen on 127.0.0.1, send no telemetry, and keep their data inside the project folder.
"""

from __future__ import annotations

import json
import os
import time
import urllib.error
import urllib.request
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any, Literal

from deployments.secret import USER, auth_string, authorization, read_secret, sign_in_link
from qwen3ft.errors import EnvironmentNotReadyError
from qwen3ft.machine.gpus import visible_gpus
from qwen3ft.tracking.experiment import EXPERIMENT_NAME, experiment_page

Service = Literal["prefect", "mlflow", "worker"]

SERVICES: tuple[Service, ...] = ("prefect", "mlflow", "worker")
SERVERS: tuple[Service, ...] = ("prefect", "mlflow")
DEPLOYMENT = "qwen3-finetune/default"
JOIN_FLOW = "qwen3-finetune-join"
JOIN_DEPLOYMENT = f"{JOIN_FLOW}/join"
"""Deployment by which a run asks for further hosts."""
HOSTS = ("127.0.0.1", "localhost")
"""Names by which the servers answer to requests; they listen on the first."""
PREFECT_SERVER = f"{__package__}.prefect_server"
"""Module that is executed as Prefect's server; a wheel has this package under another name."""
POOL = "qwen3ft"
WORKER = "qwen3ft-local"
TOML_HEADER = "# Written by `qwen3ft up`"
"""Beginning of a prefect.toml that may be replaced."""
HEARTBEAT_SECONDS = 30
"""Time between two heartbeats of a flow run; Prefect's minimum."""
LATE_HEARTBEAT_SECONDS = 3.0 * HEARTBEAT_SECONDS
"""Age of a heartbeat past which its worker is gone."""
HISTORY_DAYS = 90
"""Age at which the server removes ended flow runs; MLflow keeps what came of them."""
RUN_TAB = "tab=Artifacts"
"""Query of a run's page that opens it with its artifacts, the run card first; else its logs."""
_HTTP_SECONDS = 15.0
_LEASE_STORAGE = "prefect.server.concurrency.lease_storage.filesystem"
_BUSY = (429, 503)
_BUSY_DELAYS_SECONDS = (0.2, 0.5, 1.0, 2.0)


@dataclass(frozen=True)
class Layout:
    """Paths and addresses of one project folder's stack."""

    root: Path
    prefect_port: int
    mlflow_port: int

    @property
    def prefect_home(self) -> Path:
        """Prefect's database and cached results; shared by server, worker and local runs."""
        return self.root / ".qwen3ft" / "prefect"

    @property
    def prefect_pages(self) -> Path:
        """The server's copy of its pages, one folder per version of the UI."""
        return self.prefect_home / "pages"

    @property
    def mlflow_store(self) -> str:
        """MLflow's database, as a SQLAlchemy URL."""
        return f"sqlite:///{self.root / 'mlruns' / 'mlflow.db'}"

    @property
    def artifacts(self) -> Path:
        """Artifacts of the MLflow server; clients only ever see `mlflow-artifacts:/`."""
        return self.root / "mlruns" / "artifacts"

    @property
    def secret(self) -> str:
        """The secret of the servers; empty before the first `up`."""
        return read_secret(self.root)

    def port(self, server: Service) -> int:
        """Return the port of a server."""
        return self.prefect_port if server == "prefect" else self.mlflow_port

    def url(self, server: Service) -> str:
        """Return the address of a server."""
        return f"http://127.0.0.1:{self.port(server)}"

    def flow_run_url(self, flow_run_id: str) -> str:
        """Return a run's page, in the version of Prefect's UI that `/` leads to as well."""
        return f"{self.ui_url}/runs/flow-run/{flow_run_id}?{RUN_TAB}"

    @property
    def ui_url(self) -> str:
        """Start of links to Prefect's pages; Prefect's own links would lead to the old version."""
        return f"{self.url('prefect')}/v2"

    def sign_in_link(self, url: str) -> str:
        """Return the address of a page of the stack as it is printed on a terminal."""
        return sign_in_link(url, self.secret)

    def log(self, service: Service) -> Path:
        """Return the file with everything that `service` printed."""
        return self.root / ".qwen3ft" / "logs" / f"{service}.log"


def command(service: Service, layout: Layout, python: str) -> list[str]:
    """Return the argument list that starts `service` with the interpreter `python`."""
    if service == "worker":
        worker = f"worker start --pool {POOL} --type process --limit {_most_runs()} --name {WORKER}"
        return [python, "-m", f"{__package__}.prefect_worker", *worker.split()]
    port = layout.port(service)
    if service == "prefect":
        return [python, "-m", PREFECT_SERVER, str(port)]
    return [
        *(python, "-m", "mlflow", "server", "--host", "127.0.0.1", "--port", str(port)),
        *("--app-name", "qwen3ft", "--workers", "1", "--serve-artifacts"),
        *("--backend-store-uri", layout.mlflow_store),
        *("--artifacts-destination", str(layout.artifacts)),
        *("--allowed-hosts", f"127.0.0.1:{port},localhost:{port}"),
    ]


def _most_runs() -> int:
    """Return the number of runs that may be at once; the deployment's own limit may be lower."""
    try:
        return max(1, len(visible_gpus()))
    except EnvironmentNotReadyError:  # every run says so; what needs no GPU goes on
        return 1


def environment(layout: Layout, inherited: Mapping[str, str] = os.environ) -> dict[str, str]:
    """Return the environment of every process of the stack and of clients that talk to it.

    Inherited settings of Prefect and MLflow are dropped: the stack must not depend on what a shell
    happened to export, least of all on the address of another server.
    """
    kept = {
        name: value
        for name, value in inherited.items()
        if not name.startswith(("PREFECT_", "MLFLOW_"))
        # with it every process compiles all it imports: MLflow then takes 12 s to start, not 4
        and name != "PYTHONDONTWRITEBYTECODE"
    }
    no_proxy = [entry for entry in inherited.get("NO_PROXY", "").split(",") if entry]
    kept.update(access(layout))
    origins = [f"http://{host}:{layout.prefect_port}" for host in HOSTS]
    return kept | {
        "PREFECT_HOME": str(layout.prefect_home),
        "PREFECT_API_URL": f"{layout.url('prefect')}/api",
        "PREFECT_UI_URL": layout.ui_url,
        "PREFECT_UI_API_URL": "/api",  # of the server that the page is from, by whatever name
        "PREFECT_SERVER_CORS_ALLOWED_ORIGINS": ",".join(origins),
        "PREFECT_SERVER_UI_STATIC_DIRECTORY": str(layout.prefect_pages),
        "PREFECT_SERVER_ANALYTICS_ENABLED": "false",
        "PREFECT_SERVER_UI_SHOW_PROMOTIONAL_CONTENT": "false",
        "PREFECT_FLOWS_HEARTBEAT_FREQUENCY": str(HEARTBEAT_SECONDS),
        "PREFECT_SERVER_SERVICES_DB_VACUUM_ENABLED": "events,flow_runs",
        "PREFECT_SERVER_SERVICES_DB_VACUUM_RETENTION_PERIOD": str(HISTORY_DAYS * 86400),
        # Prefect keeps leases in the server's memory by default. A run that holds the deployment's
        # one slot would then be ended when it renews its lease with a restarted server.
        "PREFECT_SERVER_CONCURRENCY_LEASE_STORAGE": _LEASE_STORAGE,
        "PREFECT_WORKER_QUERY_SECONDS": "2",  # 10 by default: a run would wait that long to start
        "PREFECT_LOGGING_EXTRA_LOGGERS": "qwen3ft",
        # Prefect's own lines, three for each task, would bury those of the run
        "PREFECT_LOGGING_LOGGERS_PREFECT_FLOW_RUNS_LEVEL": "WARNING",
        "PREFECT_LOGGING_LOGGERS_PREFECT_TASK_RUNS_LEVEL": "WARNING",
        "PREFECT_RESULTS_LOCAL_STORAGE_PATH": str(layout.prefect_home / "storage"),
        "DO_NOT_TRACK": "true",  # MLflow knows only this spelling, Prefect also "1"
        "MLFLOW_TRACKING_URI": layout.url("mlflow"),
        "MLFLOW_DISABLE_TELEMETRY": "true",
        # it would print links, which lack the secret, amid what a command prints
        "MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT": "true",
        # job runners take 14 processes and 1.2 GB, and nothing here uses them
        "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false",
        "NO_PROXY": ",".join([*no_proxy, "127.0.0.1", "localhost"]),
    }


def access(layout: Layout) -> dict[str, str]:
    """Return the variables with which clients of both servers, and the servers, know the secret."""
    secret = layout.secret
    if not secret:
        return {}
    return {
        "PREFECT_API_AUTH_STRING": auth_string(secret),
        "PREFECT_SERVER_API_AUTH_STRING": auth_string(secret),
        "MLFLOW_TRACKING_USERNAME": USER,
        "MLFLOW_TRACKING_PASSWORD": secret,
    }


def client_variables(layout: Layout) -> dict[str, str]:
    """Return the variables that programs outside the stack need to use its servers."""
    values = environment(layout, {})
    names = (
        *("PREFECT_API_URL", "PREFECT_API_AUTH_STRING"),
        *("MLFLOW_TRACKING_URI", "MLFLOW_TRACKING_USERNAME", "MLFLOW_TRACKING_PASSWORD"),
    )
    return {name: values[name] for name in names if name in values}


def prefect_toml(layout: Layout, *, is_up: bool) -> str:
    """Return the content of a prefect.toml: what a `prefect` typed by hand is to do.

    While the stack is up, it uses its server. While it is down, it uses none: its own temporary one
    would be open to everybody, and who listens at the stack's address might not be the stack.
    """
    no_server = (
        f"{TOML_HEADER} and `qwen3ft down`: `prefect` starts no server of its own.\n"
        "# Next: qwen3ft up\n\n[server.ephemeral]\nenabled = false\n"
    )
    if not is_up:
        return no_server
    return (
        f"{TOML_HEADER}.\n"
        f"home = {json.dumps(str(layout.prefect_home))}\n"
        f"profiles_path = {json.dumps(str(layout.prefect_home / 'profiles.toml'))}\n"
        f"ui_url = {json.dumps(layout.ui_url)}\n"
        f"\n[api]\nurl = {json.dumps(layout.url('prefect') + '/api')}\n"
        f"auth_string = {json.dumps(auth_string(layout.secret))}\n"
        "\n[server.ephemeral]\nenabled = false\n"
    )


def is_healthy(service: Service, layout: Layout, started: float) -> bool:
    """Check that `service`, started at `started` (seconds since the epoch), does its work."""
    now = time.time()
    if started > now:  # the clock was set back since
        started = now - LATE_HEARTBEAT_SECONDS
    if service == "prefect":
        return ask_prefect(layout, "health") is True
    if service == "mlflow":
        return request_text(layout.secret, f"{layout.url('mlflow')}/health") == "OK"
    return any(
        worker["name"] == WORKER
        and worker["status"] == "ONLINE"
        # the database still has the row of a worker that ran before
        and datetime.fromisoformat(worker["last_heartbeat_time"]).timestamp() >= started
        for worker in ask_prefect(layout, f"work_pools/{POOL}/workers/filter", {}) or ()
    )


def ask_prefect(layout: Layout, address: str, body: Mapping[str, Any] | None = None) -> Any:
    """Return the Prefect server's answer at `address`, the part after /api/; None for none."""
    return request_json(layout.secret, f"{layout.url('prefect')}/api/{address}", body)


def find_deployment(layout: Layout) -> dict[str, Any] | None:
    """Return the deployment as the server knows it; None if it does not, or does not answer."""
    found = ask_prefect(layout, "deployments/filter", only_deployment(DEPLOYMENT))
    return found[0] if found else None


def only_deployment(name: str) -> dict[str, Any]:
    """Return a filter of the server's deployments; unlike a name, it tells none from no answer."""
    flow, deployment = name.split("/")
    return {"flows": {"name": {"any_": [flow]}}, "deployments": {"name": {"any_": [deployment]}}}


def runs_page(layout: Layout) -> str:
    """Return MLflow's page with the table of runs, in its view of training."""
    server = layout.url("mlflow")
    address = f"api/2.0/mlflow/experiments/get-by-name?experiment_name={EXPERIMENT_NAME}"
    found = request_json(layout.secret, f"{server}/{address}") or {}
    return experiment_page(server, found.get("experiment", {}).get("experiment_id"))


def request_text(
    secret: str, url: str, body: Mapping[str, Any] | None = None, method: str | None = None
) -> str | None:
    """Return a server's answer to GET, or to POST (or `method`) with a JSON `body`.

    None if it does not answer, or not with success. `secret` is that of the server's stack.
    """
    request = urllib.request.Request(  # noqa: S310 - addresses are built here, all of them http
        url,
        data=None if body is None else json.dumps(body).encode(),
        headers={
            "Content-Type": "application/json",
            "Authorization": authorization(secret),
        },
        method=method,
    )
    # no proxy, whatever the shell says: these addresses are on this machine
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    for delay_seconds in (*_BUSY_DELAYS_SECONDS, None):
        try:
            with opener.open(request, timeout=_HTTP_SECONDS) as response:
                text: str = response.read().decode()
                return text
        except urllib.error.HTTPError as error:
            # Prefect's own client waits and tries again too
            if error.code not in _BUSY or delay_seconds is None:
                return None
            time.sleep(delay_seconds)
        except (OSError, ValueError):
            return None
    return None


def request_json(secret: str, url: str, body: Mapping[str, Any] | None = None) -> Any:
    """Return the parsed answer of `request_text`; None if there is none or it is not JSON."""
    text = request_text(secret, url, body)
    try:
        return None if text is None else json.loads(text)
    except ValueError:
        return None


def last_words(output: str) -> str:
    """Return the last lines that a failed command printed, without the frames of a traceback."""
    lines = [line for line in output.splitlines() if line.strip() and not line.startswith(" ")]
    return "\n".join(lines[-4:]) or "It printed nothing."
