"""An adapter on the hub is one that plain PEFT loads, and nothing of this machine goes with it."""

from __future__ import annotations

import errno
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from huggingface_hub import ModelCard, constants
from support.hub_server import COMMIT, TOKEN, HubServer, open_hub
from support.registered import MODEL, add_version, copy_database
from support.small_adapter import write_small_adapter
from support.trained_adapter import Trained

from flows import cli
from flows.cli.adapters import ChosenAdapter
from flows.cli.hub import _scores_of
from qwen3ft.config import TrainingConfig
from qwen3ft.disk.files import write_json_atomic
from qwen3ft.errors import (
    ConfigError,
    DownloadError,
    ModelAccessError,
    ModelUnavailableError,
    RequestError,
)
from qwen3ft.jobs.folders import RunDir
from qwen3ft.model.saved_adapter import read_provenance
from qwen3ft.records.evaluation import ModelScore
from qwen3ft.registry.registry import Registry
from qwen3ft.serving.hub_push import push_adapter
from qwen3ft.tracking.journal import Journal
from qwen3ft.tracking.sender import Sender

NAME = "owner/adapter"
SCORES = [
    ModelScore(label="base", rows=480, exact_match=0.1, token_f1=0.4, answer_loss=2.0),
    ModelScore(label="candidate", rows=480, exact_match=0.86, token_f1=0.9, answer_loss=None),
]


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[HubServer]:
    """A hub on loopback, with a user who may write."""
    with open_hub() as server:
        monkeypatch.setenv("HF_ENDPOINT", server.url)
        monkeypatch.setenv("HF_TOKEN", TOKEN)
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)  # the server speaks LFS only
        yield server


def test_what_arrives_is_an_adapter_and_names_nothing_of_this_machine(
    hub: HubServer, trained: Trained
) -> None:
    """Weights, tokenizer, template, decoding and card; no rows, no hashes of rows, no paths."""
    url = push_adapter(trained.adapter, NAME, SCORES, licence="apache-2.0")
    files = hub.files[NAME]
    assert url == f"{hub.url}/{NAME}/commit/{COMMIT}"
    assert hub.private[NAME]
    assert set(files) == {
        *("README.md", "adapter_model.safetensors", "adapter_config.json", "chat_template.jinja"),
        *("generation_config.json", "tokenizer.json", "tokenizer_config.json"),
    }
    weights = trained.adapter / "adapter_model.safetensors"
    assert files["adapter_model.safetensors"] == weights.read_bytes()
    folders = {str(trained.base), str(trained.base.parent), trained.config.cache_dir}
    for name in files.keys() - {"adapter_model.safetensors"}:
        text = files[name].decode()
        assert not any(folder in text for folder in folders), name
        assert not any(row["question"] in text for row in trained.rows), name


def test_the_card_states_scores_and_data(hub: HubServer, trained: Trained) -> None:
    """Its metadata is what the hub reads."""
    push_adapter(trained.adapter, NAME, SCORES)
    card = ModelCard(hub.files[NAME]["README.md"].decode())
    results = {result.metric_type: result.metric_value for result in card.data.eval_results}
    assert results == {"exact_match": 0.86, "token_f1": 0.9}
    assert card.data.license is None  # its base is a folder
    assert "| candidate | 480 | 86.0% | 90.0% |  |" in card.text
    provenance = read_provenance(trained.adapter)
    assert f"`{provenance['base']['revision']}`" in card.text
    assert f"{provenance['data']['train']['rows']:,} rows were trained on" in card.text


def test_a_base_model_of_the_hub_gives_its_licence(hub: HubServer, tmp_path: Path) -> None:
    """The code on the card loads the very revision that was trained on."""
    hub.licences["Qwen/Qwen3-4B"] = "apache-2.0"
    write_small_adapter(tmp_path / "adapter", model_name="Qwen/Qwen3-4B")
    push_adapter(tmp_path / "adapter", NAME, ())
    card = ModelCard(hub.files[NAME]["README.md"].decode())
    assert (card.data.base_model, card.data.license) == ("Qwen/Qwen3-4B", "apache-2.0")
    assert f"from_pretrained('Qwen/Qwen3-4B', revision={'0' * 64!r})" in card.text
    assert card.data.eval_results is None
    assert "Unknown: the card of the run" in card.text


def test_who_may_not_write_is_told_to_log_in(
    hub: HubServer, trained: Trained, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The hub's 401 becomes an error with the command for it."""
    monkeypatch.setenv("HF_TOKEN", "hf_nobody")
    with pytest.raises(ModelAccessError) as raised:
        push_adapter(trained.adapter, NAME, SCORES)
    assert raised.value.next_command == "hf auth login"
    assert NAME not in hub.files


@pytest.mark.parametrize("name", ["adapter", "a/b/c", "owner/a b", "owner/../x"])
def test_a_name_that_is_no_repository_is_refused(trained: Trained, name: str) -> None:
    """Before anything is sent."""
    with pytest.raises(ConfigError, match="cannot be a repository"):
        push_adapter(trained.adapter, name, SCORES)


def test_without_network_it_says_so(trained: Trained, monkeypatch: pytest.MonkeyPatch) -> None:
    """The environment of the tests is offline."""
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    with pytest.raises(ModelUnavailableError, match="The hub cannot be reached"):
        push_adapter(trained.adapter, NAME, SCORES)


def test_a_card_that_the_hub_refuses_is_no_missing_network(hub: HubServer, tmp_path: Path) -> None:
    """Its reason is passed on."""
    write_small_adapter(tmp_path / "adapter")
    with pytest.raises(DownloadError, match="no such license"):
        push_adapter(tmp_path / "adapter", NAME, (), licence=hub.refused_licence)


def test_a_full_disk_is_no_missing_network(
    hub: HubServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The copy to be uploaded is made in the folder for temporary files."""
    write_small_adapter(tmp_path / "adapter")

    def fill(*_: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("shutil.copyfile", fill)
    with pytest.raises(OSError, match="No space left"):
        push_adapter(tmp_path / "adapter", NAME, ())


def test_the_card_says_in_which_way_an_adapter_is_degraded(hub: HubServer, tmp_path: Path) -> None:
    """As its README.md on this machine does."""
    write_small_adapter(tmp_path / "adapter", degraded=("the base is quantised otherwise",))
    push_adapter(tmp_path / "adapter", NAME, ())
    assert "degraded: the base is quantised otherwise" in hub.files[NAME]["README.md"].decode()


def test_the_command_takes_the_scores_from_the_run_s_card(
    hub: HubServer,
    trained: Trained,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """It prints where the commit is; a repository is public only if that was asked for."""
    scores = [score.model_dump(mode="json") for score in SCORES]
    (tmp_path / "night-1").mkdir()
    write_json_atomic(tmp_path / "night-1" / "card.json", {"scores": scores})
    arguments: list[Any] = ["push", NAME, "--adapter", str(trained.adapter), "--public", "--json"]
    arguments += ["--license", "mit", "--set", f"runs_dir={tmp_path}"]
    monkeypatch.setattr(sys, "argv", ["qwen3ft", *arguments])
    with pytest.raises(SystemExit) as end:
        cli.main()
    assert end.value.code == 0
    assert json.loads(capsys.readouterr().out)["commit"].endswith(COMMIT)
    assert not hub.private[NAME]
    card = ModelCard(hub.files[NAME]["README.md"].decode())
    assert card.data.license == "mit"
    assert len(card.data.eval_results) == 2


def test_what_was_to_be_private_is_not_put_into_a_public_repository(
    hub: HubServer, trained: Trained
) -> None:
    """One of that name exists; who may read it does not change by itself."""
    push_adapter(trained.adapter, NAME, SCORES, licence="mit", private=False)
    hub.files[NAME].clear()
    with pytest.raises(RequestError, match="is a public repository already"):
        push_adapter(trained.adapter, NAME, SCORES, licence="mit")
    assert hub.files[NAME] == {}


@pytest.mark.slow  # a run is sent to MLflow: 3 s
def test_the_scores_of_an_older_task_are_found_and_a_card_that_is_damaged_is_none(
    migrated_database: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In MLflow, under the name that the task had before data paths were part of it."""
    uri = copy_database(migrated_database, tmp_path)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", uri)
    monkeypatch.chdir(tmp_path)
    version = add_version(uri, tmp_path, "old", settings={"data_paths": ["a.jsonl"]})
    Registry(uri).promote(MODEL, version, None)
    run = RunDir(tmp_path / "runs" / "old")
    scores = [score.model_dump(mode="json") for score in SCORES]
    write_json_atomic(tmp_path / "card.json", {"scores": scores})
    Journal(run).artifacts(tmp_path / "card.json", "card")
    Sender(run, uri).send_all()
    config = TrainingConfig(model_name="embedded", data_paths=("a.jsonl",), runs_dir="elsewhere")
    chosen = ChosenAdapter(config, run.path / "adapter", "cpu")
    assert _scores_of(chosen) == SCORES
    here = ChosenAdapter(
        config.model_copy(update={"runs_dir": "runs"}), run.path / "adapter", "cpu"
    )
    (run.path / "card.json").write_text('{"scores": [{"wings": 2}]}')
    assert _scores_of(here) == []


@pytest.mark.parametrize("card", ["[]", "3", '{"scores": 3}', '{"scores": [{"wings": 2}]}', '{"a'])
def test_a_card_that_is_another_one_gives_no_scores(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, card: str
) -> None:
    """The adapter is uploaded all the same."""
    monkeypatch.chdir(tmp_path)
    run = RunDir(tmp_path / "runs" / "night-0")
    write_small_adapter(run.path / "adapter")
    (run.path / "card.json").write_text(card)
    config = TrainingConfig(model_name="embedded", runs_dir="runs")
    assert _scores_of(ChosenAdapter(config, run.path / "adapter", "cpu")) == []
