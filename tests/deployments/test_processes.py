"""Processes are found again, and known to be well, also after the clock was set."""

from __future__ import annotations

import json
import os
import sys
import threading
import time
from collections.abc import Iterator
from datetime import UTC, datetime
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import psutil
import pytest

from deployments import services
from deployments.processes import ProcessMark, start_detached
from deployments.services import Layout

HOUR_SECONDS = 3600.0


@pytest.fixture
def mark(tmp_path: Path) -> Iterator[ProcessMark]:
    """The mark of a process that sleeps."""
    command = [sys.executable, "-c", "import time; time.sleep(600)"]
    made = start_detached(command, environment=os.environ, folder=tmp_path, log=tmp_path / "log")
    yield made
    psutil.Process(made.pid).kill()


@pytest.mark.parametrize("jump_seconds", [HOUR_SECONDS, -HOUR_SECONDS])
def test_a_process_is_found_after_the_clock_was_set(
    mark: ProcessMark, monkeypatch: pytest.MonkeyPatch, jump_seconds: float
) -> None:
    """Linux gives start times since the boot, whose own time follows the clock."""
    booted = psutil.boot_time() + jump_seconds
    monkeypatch.setattr(psutil._psplatform, "boot_time", lambda: booted)
    moved = psutil.Process(mark.pid).create_time() - mark.create_time
    assert moved == pytest.approx(jump_seconds, abs=1.0)
    found = mark.find()
    assert found is not None
    assert found.pid == mark.pid
    assert mark.model_copy(update={"boot_id": "another"}).find() is None
    assert mark.model_copy(update={"boot_seconds": 0.0}).find() is None


def test_a_mark_of_an_earlier_version_is_understood(mark: ProcessMark) -> None:
    """It has the time since the epoch only."""
    old = ProcessMark.model_validate({"pid": mark.pid, "create_time": mark.create_time})
    assert old.find() is not None
    assert old.model_copy(update={"create_time": mark.create_time - 60}).find() is None


@pytest.mark.parametrize(
    ("started_ago", "beat_ago", "healthy"),
    [
        (10, 5, True),
        (10, 60, False),  # the row of a worker that ran before
        (-HOUR_SECONDS, 5, True),  # the clock was set back since the start
        (-HOUR_SECONDS, 600, False),
        (HOUR_SECONDS, 5, True),
    ],
)
def test_a_worker_is_well_while_its_heartbeats_are_new(
    tmp_path: Path, started_ago: float, beat_ago: float, healthy: bool
) -> None:
    """They are newer than its start, or recent if the clock was set back meanwhile."""
    now = time.time()
    beat = datetime.fromtimestamp(now - beat_ago, UTC).isoformat()
    row = {"name": services.WORKER, "status": "ONLINE", "last_heartbeat_time": beat}

    class Answer(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            self.send_response(200)
            self.end_headers()
            self.wfile.write(json.dumps([row]).encode())

        def log_message(self, *_: object) -> None:
            pass

    with HTTPServer(("127.0.0.1", 0), Answer) as server:
        threading.Thread(target=server.handle_request).start()
        layout = Layout(tmp_path, server.server_port, 1)
        assert services.is_healthy("worker", layout, now - started_ago) is healthy
