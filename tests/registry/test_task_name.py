"""Adapters for different tasks have different names in the registry, so they are not compared."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from support.registered import MODEL, add_version, copy_database

from qwen3ft.config import TrainingConfig, registered_model_name
from qwen3ft.errors import ModelNotFoundError
from qwen3ft.registry.lookup import find_adapter
from qwen3ft.registry.registry import Registry
from qwen3ft.registry.task_name import with_task_name
from qwen3ft.text.names import flaw_of_name
from qwen3ft.text.plain import is_plain


def config(*data_paths: str, **changes: Any) -> TrainingConfig:
    return TrainingConfig(model_name="embedded", data_paths=data_paths, **changes)


@pytest.mark.parametrize(
    ("one", "other"),
    [
        (("a/train.jsonl",), ("b/train.jsonl",)),
        (("data",), ("data", "more.jsonl")),
        (("hf://datasets/openai/gsm8k",), ("hf://datasets/openai/gsm8k@v2",)),
        (("data",), ()),
    ],
)
def test_other_data_is_another_task(one: tuple[str, ...], other: tuple[str, ...]) -> None:
    """Unless the user says by one name that it is the same."""
    assert config(*one).registered_name != config(*other).registered_name
    assert config(*one, name="x").registered_name == config(*other, name="x").registered_name == "x"


def test_the_spelling_of_a_path_makes_no_other_task(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Relative or absolute, in any order, named twice; the name can be read."""
    monkeypatch.chdir(tmp_path)
    names = {
        config(*paths).registered_name
        for paths in (
            ("data/qa", "b"),
            ("./data//qa", "b"),
            ("b", "data/qa", "b"),
            (str(tmp_path / "data" / "qa"), "x/../b"),
        )
    }
    [name] = names
    assert name.startswith("qwen3ft-embedded-b-")
    assert config().registered_name == "qwen3ft-embedded"
    assert "gsm8k" in config("hf://datasets/openai/gsm8k").registered_name


def test_a_key_in_a_path_is_in_no_name() -> None:
    """Names are seen wherever MLflow is."""
    secret = "hf" + "_" + "abcdefghijklmnopqrstuvwxyz0123"
    assert secret[3:] not in config(f"/data/{secret}/rows.jsonl").registered_name
    assert secret[3:] not in config(f"{secret}.jsonl").registered_name


@given(st.lists(st.text(min_size=1, max_size=300).filter(is_plain), min_size=1, max_size=3))
def test_whatever_paths_give_a_name_that_mlflow_takes(paths: list[str]) -> None:
    """Of any alphabet and length."""
    assert flaw_of_name(registered_model_name("embedded", paths)) == ""


def test_an_older_model_of_the_same_data_stays_the_tasks(
    migrated_database: Path, tmp_path: Path
) -> None:
    """Its name has no data in it. One that was trained on other data is not taken."""
    uri = copy_database(migrated_database, tmp_path)
    registry, task = Registry(uri), config("a.jsonl")
    assert with_task_name(task, registry) == task
    version = add_version(uri, tmp_path, "old", settings={"data_paths": ["a.jsonl"]})
    assert with_task_name(task, registry) == task, "nothing is in use"
    registry.promote(MODEL, version, None)
    assert with_task_name(task, registry).registered_name == MODEL
    other = config("b.jsonl")
    assert with_task_name(other, registry) == other
    with pytest.raises(ModelNotFoundError, match="has been promoted yet") as refused:
        find_adapter(other, registry, "champion")
    assert refused.value.next_command == f"qwen3ft chat --set name={MODEL}"
    named = config("a.jsonl", name="mine")
    assert with_task_name(named, registry) == named
