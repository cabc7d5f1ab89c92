"""Finds the adapter that a person names by alias, version, run or folder, and verifies it.

A folder is verified by its manifest, a version by the sha256 in the registry. An adapter of the
registry is fetched once and kept in the cache.
"""

from __future__ import annotations

import re
import shlex
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING

from qwen3ft.config import checked_name
from qwen3ft.disk.files import read_foreign_json
from qwen3ft.errors import ModelNotFoundError
from qwen3ft.model.saved_adapter import has_provenance, open_adapter
from qwen3ft.registry.aliases import CHALLENGER, CHAMPION, PREVIOUS, command_for_history
from qwen3ft.registry.task_name import with_task_name

if TYPE_CHECKING:
    from qwen3ft.config import TrainingConfig
    from qwen3ft.records.evaluation import Champion
    from qwen3ft.registry.registry import Registry

ALIASES = (CHAMPION, CHALLENGER, PREVIOUS)

_MOST_NAMED = 5

_VERSION = re.compile(r"v?([0-9]+)")


def find_adapter(config: TrainingConfig, registry: Registry, wanted: str) -> Path:
    """Return the folder of the adapter that `wanted` names.

    Args:
        config: Names the folders and the registered model.
        registry: Knows aliases, versions, and runs that saved elsewhere.
        wanted: 'champion', 'challenger' or 'previous'; a version ('7' or 'v7'); the id of a run or
            of its MLflow run; or a folder.

    Raises:
        ModelNotFoundError: there is no such adapter.
        ConfigError: `wanted` can be neither a version, a run nor a folder.
        SaveError: its files differ from what was saved.
        TrackingUnavailableError: MLflow is needed and cannot be reached.
    """
    if "/" not in wanted:
        checked_name(wanted, "run", "qwen3ft history")
    folder = Path(wanted).expanduser()
    if "/" in wanted or has_provenance(folder):
        return open_adapter(folder).folder
    name = with_task_name(config, registry).registered_name
    if (alias_or_number := version_name(wanted)) is not None:
        version = registry.version(name, alias_or_number)
    elif (saved := _saved_by_run(config, wanted)) is not None:
        return open_adapter(saved).folder
    else:
        version = registry.version_of_run(name, wanted)
    if version is None:
        raise _not_found(name, wanted, registry.in_use() if wanted == CHAMPION else [])
    return fetch_version(config, registry, version)


def version_name(wanted: str) -> str | None:
    """Return `wanted` as an alias or a version number ('7' for 'v7'); None if it is neither."""
    number = _VERSION.fullmatch(wanted)
    return number[1] if number else wanted if wanted in ALIASES else None


def fetch_version(config: TrainingConfig, registry: Registry, version: Champion) -> Path:
    """Return the folder of a version's adapter in the cache, fetched if missing or damaged."""
    parts = [
        checked_name(name, "version of a model", "qwen3ft history")
        for name in (version.registered_model, version.version)
    ]
    return registry.download(
        version, Path(config.cache_dir).resolve().joinpath("champions", *parts)
    )


def _saved_by_run(config: TrainingConfig, run: str) -> Path | None:
    """Return the folder where the run saved its adapter, if it still exists."""
    places = [Path(parent) / run for parent in (config.output_dir, *config.fallback_output_dirs)]
    with suppress(ValueError):  # no card, or a damaged one, which names no place
        card = read_foreign_json(Path(config.runs_dir) / run / "card.json")
        saved = card.get("adapter_path") if isinstance(card, dict) else None
        # a run that failed may have saved none
        places += [Path(saved)] if saved and isinstance(saved, str) else []
    return next((place for place in places if has_provenance(place)), None)


def _not_found(name: str, wanted: str, in_use: list[str]) -> ModelNotFoundError:
    if wanted == CHAMPION and in_use:
        return ModelNotFoundError(
            f"No adapter of {name} has been promoted yet.",
            why=f"That is the name of the task that the settings describe; adapters are in use for "
            f"{', '.join(in_use[:_MOST_NAMED])}.",
            next_command=f"qwen3ft chat --set {shlex.quote(f'name={in_use[0]}')}",
            registered_model=name,
        )
    if wanted == CHAMPION:
        return ModelNotFoundError(
            f"No adapter of {name} has been promoted yet.",
            why="The first run that beats the base model makes a champion.",
            next_command="qwen3ft run",
            registered_model=name,
        )
    return ModelNotFoundError(
        f"There is no adapter {wanted!r} of {name}.",
        why="No alias, version, run with a saved adapter, or folder has that name.",
        next_command=command_for_history(name),
        registered_model=name,
    )
