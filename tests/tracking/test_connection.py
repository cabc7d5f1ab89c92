"""Where MLflow is, and the experiment in it."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
from mlflow import MlflowClient
from mlflow.exceptions import MlflowException
from mlflow.protos.databricks_pb2 import PERMISSION_DENIED
from support.mlflow_server import Proxy, free_port

from qwen3ft.errors import RejectedError
from qwen3ft.tracking.connection import _folder_of, _make_experiment, connect
from qwen3ft.tracking.experiment import EXPERIMENT_NAME, EXPERIMENT_TAGS
from qwen3ft.tracking.run_metrics import METRICS, TAGS
from qwen3ft.tracking.uri import database_path, default_tracking_uri, is_answering


def test_one_who_makes_the_experiment_too_late_gets_it(database: str) -> None:
    """A first run's registry and mirror both see none, and both make it."""
    connection = connect(database)
    again = _make_experiment(connection.client, database_path(database))
    assert again == connection.experiment_id


def test_a_new_database_keeps_its_artifacts_beside_it(database: str, tmp_path: Path) -> None:
    """The experiment's artifacts have an absolute location next to the database."""
    connection = connect(database)
    experiment = connection.client.get_experiment_by_name(EXPERIMENT_NAME)
    assert experiment.artifact_location == (tmp_path / "mlruns" / "artifacts").as_uri()


@pytest.mark.parametrize(
    "path", ["../../etc", "1/../../../x", "1/../../x", "a%00/..\0", "1/../2", "1/abc/artifacts"]
)
def test_artifacts_of_a_server_stay_in_its_folder(tmp_path: Path, path: str) -> None:
    """What a database from elsewhere says about a run leads nowhere else."""
    uri = f"mlflow-artifacts:/{path}"
    if path in ("1/../2", "1/abc/artifacts"):
        assert _folder_of(uri, tmp_path) == tmp_path / path
        return
    with pytest.raises(RejectedError, match="lead out of") as raised:
        _folder_of(uri, tmp_path)
    assert raised.value.why
    assert raised.value.next_command


def test_who_may_only_read_can_connect_to_an_experiment_of_an_earlier_version(
    database: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its view stays as it is until somebody connects who may change it."""
    connection = connect(database)
    view = next(tag for tag in EXPERIMENT_TAGS if "sharedViewState" in tag)
    connection.client.set_experiment_tag(connection.experiment_id, view, "{}")

    def refuse(*_: object) -> None:
        raise MlflowException("Permission denied", PERMISSION_DENIED)

    with monkeypatch.context() as patch:
        patch.setattr(MlflowClient, "set_experiment_tag", refuse)
        connected = connect(database)
    tags = connected.client.get_experiment(connected.experiment_id).tags
    assert tags == {**EXPERIMENT_TAGS, view: "{}"}


def test_the_experiment_explains_itself_and_has_a_view_of_known_columns(database: str) -> None:
    """An experiment of an earlier version gets today's view; what a person wrote stays."""
    connection = connect(database)
    client, number = connection.client, connection.experiment_id
    assert client.get_experiment(number).tags.items() >= EXPERIMENT_TAGS.items()
    client.delete_experiment_tag(number, "mlflow.experimentKind")
    client.set_experiment_tag(number, "mlflow.note.content", "ours")
    client.set_experiment_tag(number, "mlflow.sharedViewState.nights", "{}")
    connect(database)
    tags = client.get_experiment(number).tags
    assert tags == {**EXPERIMENT_TAGS, "mlflow.note.content": "ours"}
    [view] = [json.loads(tags[tag]) for tag in tags if "sharedViewState" in tag]
    columns = [re.fullmatch("(tags|metrics)\\.`(.+)`", name) for name in view["selectedColumns"]]
    for column in columns:
        assert column
        assert column[2] in (TAGS if column[1] == "tags" else METRICS)


def test_the_default_is_a_database_of_the_working_folder(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """MLFLOW_TRACKING_URI wins; otherwise runs are kept in mlruns/mlflow.db."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    assert default_tracking_uri() == f"sqlite:///{tmp_path}/mlruns/mlflow.db"
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://127.0.0.1:5000")
    assert default_tracking_uri() == "http://127.0.0.1:5000"


def test_a_server_that_says_anything_is_answering(database: str) -> None:
    """An error is an answer; a cut or refused connection and silence are not."""
    server = Proxy()
    server.mode = "500"
    assert is_answering(server.uri)
    server.mode = "cut"
    assert not is_answering(server.uri)
    server.mode = "hang"
    assert not is_answering(server.uri, timeout_seconds=0.3)
    server.close()
    assert is_answering(database)
    assert not is_answering(f"http://127.0.0.1:{free_port()}")
