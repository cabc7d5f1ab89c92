"""Runs that nobody executes: where the settings of one that has begun are looked for."""

from __future__ import annotations

import threading
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any

import pytest

from deployments.orphans import end_run, has_begun
from deployments.prefect_api import read_deployment
from deployments.services import Layout
from deployments.stack import Stack
from qwen3ft.errors import EnvironmentNotReadyError

ELSEWHERE = {"parameters": {"config": {"model_name": "embedded", "runs_dir": "elsewhere"}}}


@pytest.mark.parametrize(
    ("deployment", "given", "folder"),
    [
        (None, {}, "runs"),
        ({"parameters": {"config": {}}}, {"config": {"runs_dir": "mine"}}, "mine"),
        (ELSEWHERE, {"config": {"num_epochs": 2}}, "elsewhere"),
        (ELSEWHERE, {"config": {"runs_dir": "mine"}}, "mine"),
        (ELSEWHERE, {"config": {"model_name": "Qwen/Qwen3-4B"}}, "runs"),
    ],
)
def test_a_run_has_begun_if_its_settings_lie_where_the_flow_puts_them(
    tmp_path: Path, deployment: dict[str, Any] | None, given: dict[str, Any], folder: str
) -> None:
    """What a run was not given is the deployment's, unless it is for another model."""
    run = {"id": "r1", "parameters": given}
    assert not has_begun(tmp_path, run, deployment)
    path = tmp_path / folder / "r1" / "config.json"
    path.parent.mkdir(parents=True)
    path.write_text("{}")
    assert has_begun(tmp_path, run, deployment)


def test_a_run_is_left_alone_while_the_server_does_not_tell_its_deployment(tmp_path: Path) -> None:
    """Else one whose folder the deployment names would count as never begun."""
    asked: list[str] = []

    class Busy(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            asked.append(self.path)
            self.send_response(401 if "deployments" in self.path else 200)
            self.end_headers()

        def log_message(self, *_: object) -> None:
            pass

    with HTTPServer(("127.0.0.1", 0), Busy) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        run = {"id": "r1", "parameters": {}, "state_type": "RUNNING", "deployment_id": "d"}
        end_run(Layout(tmp_path, server.server_port, 1), run, "It is gone.")
        server.shutdown()
    assert asked == ["/api/deployments/filter"]


def test_no_answer_is_not_no_deployment(tmp_path: Path) -> None:
    """Registering it again would reset the user's schedule."""
    with pytest.raises(EnvironmentNotReadyError, match="does not answer"):
        read_deployment(Stack(tmp_path).layout())
