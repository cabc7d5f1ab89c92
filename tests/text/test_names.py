"""Ids and names from outside: one that could lead out of its folder is refused where it enters."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from flows.cli.project import find_run_to_resume
from flows.finetune import qwen3_finetune
from flows.run_context import open_run
from qwen3ft.config import TrainingConfig, checked_name, parse_config
from qwen3ft.data.hub import parse_hub_name
from qwen3ft.errors import ConfigError, DatasetNotFoundError
from qwen3ft.records.evaluation import Champion
from qwen3ft.registry.lookup import fetch_version, find_adapter
from qwen3ft.registry.registry import Registry

HOSTILE = (
    *("../../x/y", "..", ".", "", " ", "/tmp/x", "x/../../y", "..\\x", "x\0y", "x\ny", "\x1b[2J"),
    *(".nights", "x" * 201, "é" * 101, "\u202egnp.exe", "x' OR name != 'y", "C:x", " x", "x "),
)
FINE = ("0f0a4b1e-9c1c-4f0d-8a3e-1d2c3b4a5f60", "run", "qwen3ft-Qwen--Qwen3-4B", "模型 7", "a..b")


def files_below(folder: Path) -> set[Path]:
    """Return everything below `folder`."""
    return set(folder.rglob("*"))


@pytest.mark.parametrize("name", HOSTILE)
def test_a_run_with_a_hostile_id_writes_nothing(tmp_path: Path, name: str) -> None:
    """By the parameter of the flow, by --resume, and where a run's folder is opened."""
    runs = tmp_path / "a" / "b" / "runs"
    runs.mkdir(parents=True)
    before = files_below(tmp_path)
    config = TrainingConfig(model_name="embedded", runs_dir=str(runs))

    def open_it() -> None:
        with open_run(config, name, None):
            raise AssertionError("it was opened")

    for enter in (
        lambda: qwen3_finetune.fn(config, name),
        lambda: find_run_to_resume(tmp_path, None, [f"runs_dir={runs}"], name),
        open_it,
    ):
        with pytest.raises(ConfigError, match="cannot be the name of a run") as caught:
            enter()
        assert caught.value.why
        assert caught.value.next_command
        assert "\x1b" not in str(caught.value)
    assert files_below(tmp_path) == before


@pytest.mark.parametrize("name", FINE)
def test_usual_names_are_taken_as_they_are(name: str) -> None:
    """Ids of runs, registered names, other alphabets, dots inside."""
    assert checked_name(name, "run", "qwen3ft status") == name


@pytest.mark.parametrize("name", [name for name in HOSTILE if not {"/", "\0"} & set(name)])
def test_an_adapter_of_a_hostile_run_is_refused(tmp_path: Path, name: str) -> None:
    """Nothing is looked up in MLflow or on disk."""
    config = TrainingConfig(model_name="embedded", runs_dir=str(tmp_path), output_dir=str(tmp_path))
    registry = Registry(f"sqlite:///{tmp_path}/none.db")
    with pytest.raises(ConfigError, match="cannot be the name of a run"):
        find_adapter(config, registry, name)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "fields",
    [
        {"registered_model": "../../x"},
        {"version": "../../x"},
        {"version": "/tmp/x"},
        {"source_uri": "runs:/../x"},
        {"source_uri": "file:///etc"},
    ],
)
def test_names_that_a_server_gives_do_not_lead_out_of_the_cache(
    tmp_path: Path, fields: dict[str, str]
) -> None:
    """Model, version and run of an MLflow that may be anybody's."""
    values: dict[str, Any] = {"registered_model": "m", "version": "1", "source_uri": "runs:/a/b"}
    version = Champion(**{**values, **fields}, adapter_path=None)
    config = TrainingConfig(model_name="embedded", cache_dir=str(tmp_path / "a" / "cache"))
    before = files_below(tmp_path)
    with pytest.raises(ConfigError, match="cannot be the name"):
        fetch_version(config, Registry(f"sqlite:///{tmp_path}/none.db"), version)
    assert files_below(tmp_path) == before


@pytest.mark.parametrize(
    "settings",
    [
        {"registered_model": "../x"},
        {"model_name": "x" * 300},
        {"model_name": "Qwen/it's"},
        {"model_name": "Qwen/\x1b[31mred"},
        {"model_revision": "../../x"},
        {"model_revision": "/etc"},
        {"model_revision": "a//b"},
        {"runs_dir": "runs\0"},
        {"output_dir": "out\n"},
        {"data_paths": ["good.jsonl", "\x1b]0;x\x07.jsonl"]},
        {"fallback_output_dirs": ["\u202eout"]},
        {"reasoning_separator": "\x1b[2J"},
    ],
)
def test_hostile_names_in_settings_are_refused(settings: dict[str, Any]) -> None:
    """Before a run begins, and without repeating what a terminal would obey."""
    with pytest.raises(ConfigError, match="1 invalid setting") as caught:
        parse_config(settings)
    assert not {"\x1b", "\0", "\u202e"} & set(str(caught.value))


def test_names_in_settings_that_are_usual_are_taken() -> None:
    """Branches with slashes, separators with line breaks, paths with any printable character."""
    config = parse_config(
        {
            "model_revision": "refs/pr/1",
            "reasoning_separator": "\n####\t",
            "data_paths": ["数据\u3000/a b.jsonl"],
            "model_name": "/data/models/it's mine",
            "name": "mine",
        }
    )
    assert config.registered_name == "mine"


@pytest.mark.parametrize("revision", ["..%2F..%2Fx", "%2Fetc", "a%00b", ".."])
def test_a_revision_of_a_data_set_that_leads_out_is_refused(revision: str) -> None:
    """Revisions are written with percent signs, which hide slashes."""
    with pytest.raises(DatasetNotFoundError, match="not a valid name"):
        parse_hub_name(f"hf://datasets/owner/name@{revision}")
