"""A registered version is a model that MLflow loads, and it answers as the adapter was tested."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
from support.registered import copy_database
from support.trained_adapter import Trained

from qwen3ft.errors import SaveError
from qwen3ft.jobs.folders import RunDir
from qwen3ft.model.saved_adapter import open_adapter
from qwen3ft.registry.registry import Registry
from qwen3ft.serving.mlflow_model import MlflowModel
from qwen3ft.tracking.cursor import parent_run_id
from qwen3ft.tracking.journal import Journal
from qwen3ft.tracking.sender import Sender

NAME = "qwen3ft-embedded"


@pytest.fixture(scope="module")
def tracking_uri(
    trained: Trained, migrated_database: Path, tmp_path_factory: pytest.TempPathFactory
) -> str:
    """A database of MLflow with the trained adapter as its champion, registered by the product."""
    folder = tmp_path_factory.mktemp("mlflow")
    uri = copy_database(migrated_database, folder)
    run_dir = RunDir(folder / "runs" / "night-1")
    journal = Journal(run_dir)
    journal.run_started("night-1", {}, {})
    journal.artifacts(trained.adapter, "adapter")
    Sender(run_dir, uri).send_all()
    named = trained.saved.model_copy(update={"registered_model": NAME})
    version = Registry(uri).register(str(parent_run_id(run_dir)), named, {})
    Registry(uri).promote(NAME, version, None)
    return uri


@pytest.fixture
def loaded(tracking_uri: str, monkeypatch: pytest.MonkeyPatch) -> Any:
    """The champion, loaded as MLflow's documentation says."""
    import mlflow

    # set_tracking_uri would stay for all tests that come after
    monkeypatch.setenv("MLFLOW_TRACKING_URI", tracking_uri)
    return mlflow.pyfunc.load_model(f"models:/{NAME}@champion")


def test_the_champion_answers_as_it_was_trained(loaded: Any, trained: Trained) -> None:
    """A frame of questions gives a frame of answers; the schema is enforced by MLflow."""
    questions = pd.DataFrame({"question": [row["question"] for row in trained.rows]})
    answers = loaded.predict(questions)
    assert list(answers["answer"]) == [row["answer"] for row in trained.rows]
    assert loaded.metadata.signature.inputs.input_names() == ["question"]
    assert loaded.metadata.signature.outputs.input_names() == ["answer"]
    assert list(loaded.input_example.columns) == ["question"]
    with pytest.raises(Exception, match="Model is missing inputs"):
        loaded.predict(pd.DataFrame({"frage": ["?"]}))


def test_the_folder_has_no_pickle_and_not_the_base_model(trained: Trained) -> None:
    """What MLflow executes is this package's own module, by name."""
    names = {path.name for path in trained.adapter.iterdir()}
    assert not [name for name in names if name.endswith((".pkl", ".pickle", ".bin", ".py"))]
    assert [name for name in names if name.endswith(".safetensors")] == [
        "adapter_model.safetensors"
    ]
    flavors = json.loads((trained.adapter / "MLmodel").read_text(encoding="utf-8"))["flavors"]
    assert flavors["python_function"]["loader_module"] == "qwen3ft.entry_points"


def test_a_damaged_version_is_not_loaded(trained: Trained, tmp_path: Path) -> None:
    """The manifest covers MLflow's files as all others."""
    folder = Path(shutil.copytree(trained.adapter, tmp_path / "adapter"))
    weights = folder / "adapter_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1] + b"x")
    with pytest.raises(SaveError, match="is damaged"):
        MlflowModel(folder)


def test_an_adapter_saved_before_mlflow_could_load_it_still_opens(
    trained: Trained, tmp_path: Path
) -> None:
    """The two files are nothing that the product reads."""
    from qwen3ft.disk.manifests import read_manifest_facts, write_manifest

    folder = Path(shutil.copytree(trained.adapter, tmp_path / "adapter"))
    for name in ("MLmodel", "input_example.json"):
        (folder / name).unlink()
    write_manifest(folder, read_manifest_facts(trained.adapter))
    assert open_adapter(folder).provenance["run_id"] == "night-1"


@pytest.mark.slow
def test_without_the_4_bit_base_it_is_made_once(
    trained: Trained, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Another machine has the base model's name and revision alone."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    gone = Path(trained.snapshot.path)
    gone.rename(gone.with_name("elsewhere"))
    try:
        model = MlflowModel(trained.adapter)
    finally:
        gone.with_name("elsewhere").rename(gone)
    row = trained.rows[0]
    answers = model.predict(pd.DataFrame({"question": [row["question"]]}))
    assert list(answers["answer"]) == [row["answer"]]
