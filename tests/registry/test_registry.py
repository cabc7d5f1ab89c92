"""Adapters in the registry of a real MLflow: registered, promoted, fetched, refused."""

from __future__ import annotations

import threading
import time
from pathlib import Path
from typing import Any

import pytest
from support.mlflow_server import free_port
from support.small_adapter import write_small_adapter
from support.tracked_run import MODEL, journal_adapter, send_all

from qwen3ft.config import registered_model_name
from qwen3ft.disk.files import sha256_file
from qwen3ft.errors import ChampionChangedError, ConfigError, SaveError, TrackingUnavailableError
from qwen3ft.jobs.folders import RunDir
from qwen3ft.records.model import SavedAdapter
from qwen3ft.registry.registry import Registry
from qwen3ft.tracking.connection import connect
from qwen3ft.tracking.cursor import parent_run_id
from qwen3ft.tracking.journal import Journal


@pytest.fixture
def registered(database: str, run_dir: RunDir) -> tuple[Registry, SavedAdapter, str]:
    """A registry with one version of one adapter."""
    saved = journal_adapter(run_dir)
    send_all(run_dir, database)
    registry = Registry(database)
    return registry, saved, registry.register(str(parent_run_id(run_dir)), saved, {"loss": "1.2"})


def test_a_registered_adapter_can_be_promoted_and_fetched(
    registered: tuple[Registry, SavedAdapter, str], run_dir: RunDir, tmp_path: Path
) -> None:
    """Registering twice gives one version, and its champion is downloaded as it was saved."""
    registry, saved, version = registered
    name = registered_model_name(MODEL)
    assert registry.register(str(parent_run_id(run_dir)), saved, {}) == version
    assert registry.champion(name) is None
    registry.promote(name, version, expected=None)
    champion = registry.champion(name)
    assert (champion.version, champion.tags["loss"]) == (version, "1.2")
    path = registry.download(champion, tmp_path / "fetched")
    assert sha256_file(path / "adapter_model.safetensors") == saved.sha256
    assert registry.download(champion, path) == path


def test_an_adapter_changed_in_mlflow_is_neither_registered_nor_fetched(
    registered: tuple[Registry, SavedAdapter, str], run_dir: RunDir, tmp_path: Path
) -> None:
    """One flipped byte among the artifacts is found before a version is made or handed out."""
    registry, saved, version = registered
    name, run_id = registered_model_name(MODEL), str(parent_run_id(run_dir))
    registry.promote(name, version, expected=None)
    champion = registry.champion(name)
    stored = tmp_path / "mlruns" / "artifacts" / run_id / "artifacts" / "adapter"
    (stored / "adapter_model.safetensors").write_bytes(b"weights")
    with pytest.raises(SaveError, match="has sha256"):
        registry.register(run_id, saved.model_copy(update={"registered_model": "other"}), {})
    assert registry.champion("other") is None
    with pytest.raises(SaveError, match="has sha256"):
        registry.download(champion, tmp_path / "fetched")
    assert not (tmp_path / "fetched").exists()


def test_an_adapter_that_never_arrived_is_not_registered(database: str, run_dir: RunDir) -> None:
    """Without the artifact in MLflow there is no version, even if the local file is intact."""
    saved = write_small_adapter(run_dir.path / "adapter")
    Journal(run_dir).run_started("run-1", {}, {})
    send_all(run_dir, database)
    with pytest.raises(TrackingUnavailableError, match="holds no adapter"):
        Registry(database).register(str(parent_run_id(run_dir)), saved, {})


def test_promotion_compares_before_it_sets(
    registered: tuple[Registry, SavedAdapter, str], database: str, tmp_path: Path
) -> None:
    """An outdated champion is refused, and the version in use before stays reachable."""
    registry, _, first = registered
    name = registered_model_name(MODEL)
    other = RunDir(tmp_path / "runs" / "run-2")
    saved = journal_adapter(other)
    send_all(other, database)
    second = registry.register(str(parent_run_id(other)), saved, {})
    registry.promote(name, first, expected=None)
    with pytest.raises(ChampionChangedError, match=f"champion is {first}, not None"):
        registry.promote(name, second, expected=None)
    registry.promote(name, second, expected=first)
    registry.promote(name, second, expected=first)
    aliases = registry.history(name).aliases
    assert (aliases.champion, aliases.previous) == (second, first)


def test_of_many_promoters_at_once_exactly_one_wins(
    registered: tuple[Registry, SavedAdapter, str], database: str, run_dir: RunDir
) -> None:
    """Of eight threads that saw no champion, one promotes its version and seven are refused."""
    client, name = connect(database).client, registered_model_name(MODEL)
    run_id = str(parent_run_id(run_dir))
    versions = [
        str(client.create_model_version(name, f"runs:/{run_id}/adapter", run_id=run_id).version)
        for _ in range(8)
    ]
    outcomes: list[Any] = []

    def promote(version: str) -> None:
        try:
            Registry(database).promote(name, version, expected=None)
            outcomes.append(version)
        except ChampionChangedError:
            outcomes.append(None)

    threads = [threading.Thread(target=promote, args=(version,)) for version in versions]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    winners = [outcome for outcome in outcomes if outcome is not None]
    assert winners == [Registry(database).champion(name).version]
    assert len(outcomes) == 8


def test_an_unreachable_registry_says_so_in_time(hanging_server: str) -> None:
    """It gives up at its deadline, whether a server hangs or there is none."""
    for uri in (hanging_server, f"http://127.0.0.1:{free_port()}"):
        start = time.monotonic()
        with pytest.raises(TrackingUnavailableError):
            Registry(uri, deadline_seconds=1).champion("model")
        assert time.monotonic() - start < 3


@pytest.mark.parametrize("name", ["a/b", "a:b", "a'b", ""])
def test_a_name_that_the_registry_cannot_hold_is_refused(database: str, name: str) -> None:
    """Forbidden characters are refused before MLflow is asked."""
    with pytest.raises(ConfigError):
        Registry(database).champion(name)


@pytest.mark.parametrize(
    ("model_name", "expected"),
    [
        (MODEL, "qwen3ft-Qwen--Qwen3-4B-Thinking-2507"),
        ("embedded", "qwen3ft-embedded"),
        ("/models/local/qwen", "qwen3ft-local--qwen"),
        ("./qwen", "qwen3ft-qwen"),
    ],
)
def test_every_model_has_a_valid_registry_name(model_name: str, expected: str) -> None:
    """Hub names, folders and the embedded model all give names without '/' and ':'."""
    assert registered_model_name(model_name) == expected
