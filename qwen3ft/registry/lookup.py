"""Which adapter a person means: an alias, a version, a run or a folder; verified, as a folder.

Guarantees: what is handed out was verified: a folder by its manifest, a version by the sha256 that
the registry has of it. An adapter of the registry is fetched once and kept in the cache.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import TYPE_CHECKING

from qwen3ft.errors import ModelNotFoundError
from qwen3ft.model.saved_adapter import check_adapter, has_provenance
from qwen3ft.registry.aliases import CHALLENGER, CHAMPION, PREVIOUS

if TYPE_CHECKING:
    from qwen3ft.config import TrainingConfig
    from qwen3ft.records.evaluation import Champion
    from qwen3ft.registry.registry import Registry

ALIASES = (CHAMPION, CHALLENGER, PREVIOUS)

_VERSION = re.compile(r"v?([0-9]+)")


def find_adapter(config: TrainingConfig, registry: Registry, wanted: str) -> Path:
    """The folder of the adapter that `wanted` names.

    Args:
        config: Says where folders are, and which registered model is meant.
        registry: Asked for aliases, versions, and runs that saved elsewhere.
        wanted: 'champion', 'challenger', 'previous'; a version ('7' or 'v7'); the id of a run, or
            of its MLflow run; or a folder.

    Raises:
        ModelNotFoundError: there is no such adapter.
        SaveError: its files are not those that were saved.
        TrackingUnavailableError: MLflow is needed and cannot be reached.
    """
    folder = Path(wanted).expanduser()
    if "/" in wanted or has_provenance(folder):
        check_adapter(folder)
        return folder
    name = config.registered_name
    if (alias_or_number := version_name(wanted)) is not None:
        version = registry.version(name, alias_or_number)
    elif (saved := _saved_by_run(config, wanted)) is not None:
        check_adapter(saved)
        return saved
    else:
        version = registry.version_of_run(name, wanted)
    if version is None:
        raise _not_found(name, wanted)
    return fetch_version(config, registry, version)


def version_name(wanted: str) -> str | None:
    """An alias, or the number of a version ('7' for 'v7' too); None if `wanted` is neither."""
    number = _VERSION.fullmatch(wanted)
    return number[1] if number else wanted if wanted in ALIASES else None


def fetch_version(config: TrainingConfig, registry: Registry, version: Champion) -> Path:
    """The folder of a version's adapter in the cache, fetched if it is not there or damaged."""
    folder = Path(config.cache_dir).resolve() / "champions" / version.registered_model
    return registry.download(version, folder / version.version)


def _saved_by_run(config: TrainingConfig, run: str) -> Path | None:
    """Where the run saved its adapter, if that is still there."""
    places = [Path(parent) / run for parent in (config.output_dir, *config.fallback_output_dirs)]
    card = Path(config.runs_dir) / run / "card.json"
    if card.is_file():
        saved = json.loads(card.read_text(encoding="utf-8")).get("adapter_path")
        places += [Path(saved)] if saved else []  # a run that failed may have saved none
    return next((place for place in places if has_provenance(place)), None)


def _not_found(name: str, wanted: str) -> ModelNotFoundError:
    if wanted == CHAMPION:
        return ModelNotFoundError(
            f"No adapter of {name} has been promoted yet.",
            why="The first run that beats the base model makes a champion.",
            next_command="qwen3ft run",
            registered_model=name,
        )
    return ModelNotFoundError(
        f"There is no adapter {wanted!r} of {name}.",
        why="It is no alias or version in the registry, no run that saved an adapter, no folder.",
        next_command="qwen3ft history",
        registered_model=name,
    )
