"""The set-up for a team in docs/operating.md: PostgreSQL, and passwords on both servers.

PostgreSQL (Debian: apt install postgresql), Prefect and MLflow are real; a worker that has only
addresses and passwords carries out a whole run.
"""

from __future__ import annotations

import json
import sys
import urllib.error
from collections.abc import Iterator

import pytest
from support.team import Team, needs_postgres, started_team

from qwen3ft.records.run_card import COMPLETED_STATES

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900), needs_postgres]


@pytest.fixture(scope="module")
def team() -> Iterator[Team]:
    """Start both servers on one PostgreSQL, each with a password."""
    with started_team() as made:
        yield made


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
    team.start(*command, cwd=team.project, env=team.environment)
    small = {"max_steps": 6, "evaluate_every_steps": 2, "inference_rows": 24, "max_rows": 96}
    config = {"model_name": "embedded", "max_memory_gb": 4.0, "max_new_tokens": 24, **small}
    parameters = json.dumps({"config": config})
    team.run(
        *("deployment", "run", "qwen3-finetune/default", "--params", parameters),
        *("--watch", "--watch-timeout", "600"),
    )
    with team.connect("prefect") as connection:
        [(run, state)] = connection.execute("SELECT id, state_name FROM flow_run").fetchall()
    assert state in COMPLETED_STATES
    with team.connect("mlflow") as connection:
        status = connection.execute(
            "SELECT r.status FROM runs r JOIN tags t ON r.run_uuid = t.run_uuid"
            " WHERE t.key = 'prefect.flow_run_id' AND t.value = %s",
            [str(run)],
        ).fetchall()
        versions = connection.execute("SELECT name, version FROM model_versions").fetchall()
    assert status == [("FINISHED",)]
    assert versions == [("qwen3ft-embedded", 1)]
    assert list((team.root / "artifacts").rglob("adapter_model.safetensors"))
