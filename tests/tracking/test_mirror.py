"""Keeping MLflow up to date through outages, against real servers and databases."""

from __future__ import annotations

import sqlite3
import subprocess
import sys
import time
from pathlib import Path

import pytest
from support.mlflow_server import Proxy, free_port, wait_until
from support.tracked_run import (
    artifact_names,
    journal_run,
    make_plan,
    send_all,
    steps_of,
    write_steps,
)

from qwen3ft.jobs.folders import RunDir
from qwen3ft.tracking.connection import connect
from qwen3ft.tracking.cursor import outstanding, parent_run_id, read_state, wait_until_sent
from qwen3ft.tracking.journal import Journal
from qwen3ft.tracking.mirror import Mirror, replay_unsent
from qwen3ft.tracking.uri import run_url


def test_a_live_mirror_follows_the_worker_and_samples_the_system(
    database: str, run_dir: RunDir, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Metrics of a running attempt arrive before it ends, and MLflow's system metrics with them."""
    monkeypatch.setenv("MLFLOW_SYSTEM_METRICS_SAMPLING_INTERVAL", "0.2")
    mirror = Mirror(run_dir, database).start()
    journal = Journal(run_dir)
    journal.run_started("run-1", {}, {})
    journal.attempt_started(make_plan(run_dir))
    write_steps(run_dir.attempt(1), range(1, 6))
    assert wait_until_sent(run_dir, 60)
    wait_until(lambda: steps_of(database, run_dir) == [1, 2, 3, 4, 5], seconds=60)
    client, parent = connect(database).client, parent_run_id(run_dir)
    wait_until(
        lambda: "system/cpu_utilization_percentage" in client.get_run(parent).data.metrics, 10
    )
    write_steps(run_dir.attempt(1), range(6, 9))
    journal.attempt_ended(1, "FAILED", {"failure": "OutOfMemoryError"})
    journal.run_finished("FAILED")
    assert mirror.close(60)
    assert steps_of(database, run_dir) == list(range(1, 9))
    assert client.get_run(parent).info.status == "FAILED"


def test_nothing_is_lost_when_mlflow_is_down_for_the_whole_run(
    database: str, run_dir: RunDir, caplog: pytest.LogCaptureFixture
) -> None:
    """A refused connection is reported once and delays nobody; a later run sends all points."""
    mirror = Mirror(run_dir, f"http://127.0.0.1:{free_port()}").start()
    journal_run(run_dir, steps=700)
    wait_until(lambda: "unreachable" in caplog.text, seconds=60)
    assert not mirror.close(2)
    assert outstanding(run_dir) == 6 + 700 + 70 + 700
    assert caplog.text.count("is unreachable; everything is kept in") == 1

    assert replay_unsent(run_dir.path.parent, database) == 0

    assert steps_of(database, run_dir) == list(range(1, 701))


def test_the_end_of_a_run_does_not_wait_for_what_has_long_been_gone(
    run_dir: RunDir, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Half a minute is for a server that is being restarted, not for one that is down all night."""
    mirror = Mirror(run_dir, f"http://127.0.0.1:{free_port()}").start()
    journal_run(run_dir, steps=1)
    wait_until(lambda: "unreachable" in caplog.text, seconds=60)
    monkeypatch.setattr("qwen3ft.tracking.mirror._HOPE_SECONDS", 0.0)
    started = time.monotonic()
    assert not mirror.close(60)
    assert time.monotonic() - started < 10


def test_a_hanging_mlflow_neither_delays_the_flow_nor_its_exit(
    hanging_server: str, run_dir: RunDir
) -> None:
    """Against a server that never answers, appending stays fast and the process can end."""
    script = f"""
import time
from pathlib import Path
from qwen3ft.jobs.folders import RunDir
from qwen3ft.tracking.journal import Journal
from qwen3ft.tracking.mirror import Mirror
run_dir = RunDir(Path({str(run_dir.path)!r}))
mirror = Mirror(run_dir, {hanging_server!r}).start()
journal = Journal(run_dir)
journal.run_started("run-1", {{}}, {{}})
import mlflow
time.sleep(0.5)
durations = []
for step in range(500):
    start = time.perf_counter()
    journal.metrics({{"loss": 1.0}}, step)
    durations.append(time.perf_counter() - start)
start = time.perf_counter()
closed = mirror.close(2)
print(sorted(durations)[250], closed, time.perf_counter() - start, time.time())
"""
    result = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, timeout=200, check=True
    )
    ended = time.time()
    median_seconds, closed, close_seconds, finished = result.stdout.split()
    assert float(median_seconds) < 0.001
    assert closed == "False"
    assert 1.9 < float(close_seconds) < 3
    assert ended - float(finished) < 5
    assert outstanding(run_dir) == 501


def test_runs_survive_an_outage_in_their_middle(
    server: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever a server does for a while, the same mirror sends everything once it is back."""
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_TIMEOUT", "1")
    port = int((server / "port").read_text())
    runs = {fault: RunDir(tmp_path / "runs" / fault) for fault in ("cut", "500", "hang")}
    proxies = {fault: Proxy(port) for fault in runs}
    mirrors = {fault: Mirror(run, proxies[fault].uri).start() for fault, run in runs.items()}
    journals = {fault: Journal(run) for fault, run in runs.items()}
    for fault, run in runs.items():
        journals[fault].run_started(f"run-{fault}", {}, {})
        journals[fault].attempt_started(make_plan(run))
        write_steps(run.attempt(1), range(1, 11))
    assert all(wait_until_sent(run, 60) for run in runs.values())
    for fault, run in runs.items():
        proxies[fault].mode = fault
        write_steps(run.attempt(1), range(11, 31))
        journals[fault].metrics({"peak_memory_gb": 1.0})
    assert not any(wait_until_sent(run, 0.5) for run in runs.values())
    for fault in runs:
        proxies[fault].mode = "pass"
        journals[fault].attempt_ended(1, "FINISHED")
        journals[fault].run_finished("FINISHED")
    for fault, run in runs.items():
        assert mirrors[fault].close(60), fault
        assert steps_of(f"http://127.0.0.1:{port}", run) == list(range(1, 31))
        proxies[fault].close()


def test_a_run_sent_through_a_server_goes_on_without_it(server: Path, run_dir: RunDir) -> None:
    """A database filled by a server takes artifacts directly, in the place the server uses."""
    port = (server / "port").read_text()
    uri = f"http://127.0.0.1:{port}"
    journal = journal_run(run_dir)
    send_all(run_dir, uri)
    state = read_state(run_dir)
    assert run_url(uri, state) == (
        f"{uri}/#/experiments/{state.experiment_id}/runs/{state.parent_run_id}"
        "?workflowType=machine_learning"
    )

    database = f"sqlite:///{server / 'mlflow.db'}"
    assert run_url(database, state) is None
    journal.text("late.txt", "written without the server")
    send_all(run_dir, database)
    assert "late.txt" in artifact_names(uri, str(state.parent_run_id), "")


def test_a_locked_database_delays_but_loses_nothing(
    database: str, run_dir: RunDir, caplog: pytest.LogCaptureFixture
) -> None:
    """While another process holds the database, appending goes on; then everything arrives."""
    journal_run(run_dir)
    holder = sqlite3.connect(database.removeprefix("sqlite:///"), isolation_level=None)
    holder.execute("BEGIN EXCLUSIVE")
    mirror = Mirror(run_dir, database).start()
    assert not wait_until_sent(run_dir, 1)
    holder.execute("ROLLBACK")
    holder.close()
    assert mirror.close(60)
    assert steps_of(database, run_dir) == list(range(1, 21))


def test_only_one_process_sends_a_run(database: str, run_dir: RunDir) -> None:
    """While a mirror is at work, nobody else sends its run or takes it for abandoned."""
    mirror = Mirror(run_dir, f"http://127.0.0.1:{free_port()}").start()
    wait_until(lambda: (run_dir.path / "tracking.lock").exists(), seconds=5)
    time.sleep(0.1)
    Journal(run_dir).run_started("run-1", {}, {})
    assert replay_unsent(run_dir.path.parent, database) == 1
    mirror.close(1)


def test_a_run_whose_process_died_is_closed(database: str, run_dir: RunDir) -> None:
    """The next run's catch-up ends an abandoned run and its attempt as KILLED."""
    journal = Journal(run_dir)
    journal.run_started("run-1", {}, {})
    journal.attempt_started(make_plan(run_dir))
    write_steps(run_dir.attempt(1), range(1, 4))
    assert replay_unsent(run_dir.path.parent, database) == 0
    client, state = connect(database).client, read_state(run_dir)
    assert client.get_run(state.parent_run_id).info.status == "KILLED"
    assert client.get_run(state.attempts[1].run_id).info.status == "KILLED"
    assert steps_of(database, run_dir) == [1, 2, 3]
