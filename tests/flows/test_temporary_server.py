"""The Prefect server of a flow that runs without one: started in time, alone, and gone with it."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import textwrap
from pathlib import Path

import psutil
import pytest
from prefect.settings import PREFECT_HOME, temporary_settings
from support.databases import migrated

from flows.temporary_server import temporary_server
from qwen3ft.errors import EnvironmentNotReadyError

ROOT = Path(__file__).parents[2]

# Once it listens, it does not answer for six seconds; Prefect gives its own server five.
SLOW = """
import os, signal, socket, subprocess, sys, threading, time

if "deployments.prefect_server" in sys.orig_argv:
    port = int(sys.orig_argv[sys.orig_argv.index("deployments.prefect_server") + 1])

    def hang():
        while socket.socket().connect_ex(("127.0.0.1", port)):
            time.sleep(0.01)
        pid = os.getpid()
        subprocess.Popen(["sh", "-c", f"kill -STOP {pid}; sleep 6; kill -CONT {pid}"])

    threading.Thread(target=hang, daemon=True).start()
"""

FLOW = """
import sys
import httpx
from prefect import flow
from prefect.runtime import flow_run
from prefect.settings import PREFECT_API_URL

from flows.temporary_server import temporary_server

@flow(log_prints=True)
def work():
    print(f"page: {flow_run.ui_url}")
    unsigned = httpx.get(f"{PREFECT_API_URL.value()}/flow_runs/count", trust_env=False)
    print(f"without the secret: {unsigned.status_code}")
    if "die" in sys.argv:
        import os
        os.kill(os.getpid(), 9)
    return "done"

with temporary_server():
    print(f"server: {PREFECT_API_URL.value()}")
    print(work())
print(f"then: {PREFECT_API_URL.value() or None}")
"""


def run(folder: Path, *arguments: str, **variables: str) -> subprocess.CompletedProcess[str]:
    """Run the flow in a process of its own, which has no server."""
    path = os.pathsep.join([str(folder), str(ROOT)])
    return subprocess.run(
        [sys.executable, "-c", FLOW, *arguments],
        cwd=folder,
        env={**os.environ, "PYTHONPATH": path, "PREFECT_HOME": str(folder / "home"), **variables},
        capture_output=True,
        text=True,
    )


def servers(folder: Path) -> list[psutil.Process]:
    """Return the temporary servers of flows in a folder."""
    home = str(folder / "home")
    return [
        process
        for process in psutil.process_iter(["cmdline", "environ"])
        if "--until-stdin-ends" in (process.info["cmdline"] or ())
        and (process.info["environ"] or {}).get("PREFECT_HOME") == home
    ]


@pytest.mark.slow
def test_a_server_that_answers_late_is_waited_for(tmp_path: Path) -> None:
    """It has no page to name in records, answers nobody else, and is gone when the flow ended."""
    (tmp_path / "sitecustomize.py").write_text(textwrap.dedent(SLOW))
    (tmp_path / "home").mkdir()
    shutil.copy(migrated("prefect"), tmp_path / "home" / "prefect.db")
    done = run(tmp_path)
    assert done.returncode == 0, done.stderr
    assert "server: http://127.0.0.1:" in done.stdout
    assert "done\nthen: None" in done.stdout
    assert "page: http" not in done.stderr
    assert "without the secret: 401" in done.stderr
    assert "Traceback" not in done.stderr
    assert servers(tmp_path) == []


@pytest.mark.slow
def test_the_server_ends_with_a_flow_that_is_killed(tmp_path: Path) -> None:
    """Otherwise it would keep the database to itself for ever."""
    assert run(tmp_path, "die").returncode == -9
    _, alive = psutil.wait_procs(servers(tmp_path), timeout=60)
    assert alive == []


def test_a_server_that_cannot_start_is_reported_with_its_reason(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What, why and the next command; the flow is not started."""
    database = f"sqlite+aiosqlite:///{tmp_path / 'no' / 'such' / 'folder.db'}"
    monkeypatch.setenv("PREFECT_SERVER_DATABASE_CONNECTION_URL", database)
    with (
        temporary_settings({PREFECT_HOME: tmp_path / "home"}),
        pytest.raises(EnvironmentNotReadyError, match="Prefect's temporary server ended") as ended,
        temporary_server(),
    ):
        raise AssertionError("the flow was started")
    assert "unable to open database file" in ended.value.why
    assert ended.value.next_command
