"""MLflow servers for tests: real ones, and ones that fail."""

from __future__ import annotations

import os
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from qwen3ft.jobs.folders import RunDir


def free_port() -> int:
    """A port that nothing listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def is_healthy(port: int) -> bool:
    """Whether MLflow answers on this port."""
    try:
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=1) as answer:
            return bool(answer.status == 200)
    except OSError:
        return False


def wait_until(condition: Callable[[], bool], seconds: float) -> None:
    """Fail unless the condition holds within so many seconds."""
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, f"not so within {seconds} s"
        time.sleep(0.05)


class Proxy:
    """Stands before a server and passes, refuses, cuts, fails or swallows every request."""

    def __init__(self, target_port: int = 0) -> None:
        self.mode = "pass" if target_port else "hang"
        self.target_port = target_port
        self._held: list[socket.socket] = []
        self._socket = socket.create_server(("127.0.0.1", 0))
        self.uri = f"http://127.0.0.1:{self._socket.getsockname()[1]}"
        threading.Thread(target=self._accept, daemon=True).start()

    def close(self) -> None:
        """Stop listening and drop what is held."""
        self._socket.close()
        for connection in self._held:
            connection.close()

    def _accept(self) -> None:
        while True:
            try:
                connection, _ = self._socket.accept()
            except OSError:
                return
            self._held.append(connection)
            threading.Thread(target=self._serve, args=(connection,), daemon=True).start()

    def _serve(self, connection: socket.socket) -> None:
        try:
            data = connection.recv(65536)
            if self.mode == "hang":
                return
            if self.mode == "cut":
                connection.close()
                return
            if self.mode == "500":
                connection.sendall(b"HTTP/1.1 500 Oops\r\nContent-Length: 0\r\n\r\n")
                connection.close()
                return
            upstream = socket.create_connection(("127.0.0.1", self.target_port))
            upstream.sendall(data)
            threading.Thread(target=self._pump, args=(connection, upstream), daemon=True).start()
            self._pump(upstream, connection)
        except OSError:
            connection.close()

    def _pump(self, source: socket.socket, sink: socket.socket) -> None:
        try:
            while data := source.recv(65536):
                if self.mode != "pass":
                    break
                sink.sendall(data)
        except OSError:
            pass
        if self.mode != "hang":
            source.close()
            sink.close()


@pytest.fixture
def database(migrated_database: Path, tmp_path: Path) -> str:
    """The tracking URI of a fresh database."""
    (tmp_path / "mlruns").mkdir()
    path = shutil.copy(migrated_database, tmp_path / "mlruns" / "mlflow.db")
    return f"sqlite:///{path}"


@pytest.fixture
def run_dir(tmp_path: Path) -> RunDir:
    """The folder of a run that has not begun."""
    return RunDir(tmp_path / "runs" / "run-1")


@pytest.fixture(scope="session")
def server(migrated_database: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """MLflow's server; gives its folder, which holds mlflow.db, artifacts and `port`.

    It is started as `mlflow server` starts it, without importing that command first; the stack's
    tests run the command.
    """
    from mlflow.server import constants

    folder, port = tmp_path_factory.mktemp("server"), free_port()
    database = shutil.copy(migrated_database, folder / "mlflow.db")
    command = [sys.executable, "-m", "uvicorn", "mlflow.server.fastapi_app:app"]
    command += ["--host", "127.0.0.1", "--port", str(port)]
    settings = {
        constants.BACKEND_STORE_URI_ENV_VAR: f"sqlite:///{database}",
        constants.ARTIFACT_ROOT_ENV_VAR: "mlflow-artifacts:/",
        constants.ARTIFACTS_DESTINATION_ENV_VAR: str(folder / "artifacts"),
        constants.SERVE_ARTIFACTS_ENV_VAR: "true",
        "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false",
    }
    with (folder / "server.log").open("wb") as log:
        process = subprocess.Popen(
            command,
            stdout=log,
            stderr=log,
            start_new_session=True,
            env={**os.environ, **settings},
        )
    try:
        wait_until(lambda: is_healthy(port), seconds=200)
        (folder / "port").write_text(str(port))
        yield folder
    finally:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()


@pytest.fixture
def hanging_server() -> Iterator[str]:
    """A server that takes requests and never answers."""
    proxy = Proxy()
    yield proxy.uri
    proxy.close()
