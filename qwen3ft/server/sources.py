"""The adapter that a person or the registry names, as something to serve."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from qwen3ft.config import TrainingConfig
from qwen3ft.model.saved_adapter import has_provenance, open_adapter
from qwen3ft.records.evaluation import Champion
from qwen3ft.registry.lookup import fetch_version, find_adapter, version_name
from qwen3ft.registry.registry import Registry
from qwen3ft.registry.task_name import with_task_name


@dataclass(frozen=True)
class Source:
    """An adapter to serve, verified and on this machine."""

    name: str
    number: str | None
    folder: Path


def find_source(config: TrainingConfig, registry: Registry, wanted: str) -> Source:
    """Return the adapter of that alias, version, run or folder, as `find_adapter` finds it.

    Raises:
        FinetuneError: there is none, or it is damaged.
    """
    is_folder = "/" in wanted or has_provenance(Path(wanted))
    if not is_folder and (alias_or_number := version_name(wanted)) is not None:
        model = with_task_name(config, registry).registered_name
        version = registry.version(model, alias_or_number)
        if version is not None:
            return source_of(config, registry, version)
    folder = find_adapter(config, registry, wanted)
    run_id = open_adapter(folder).provenance["run_id"]
    return Source(f"{config.registered_name}-{run_id}", None, folder.resolve())


def source_of(config: TrainingConfig, registry: Registry, version: Champion) -> Source:
    """Fetch a version of the registry; return it as something to serve."""
    folder = fetch_version(config, registry, version)
    return Source(f"{version.registered_model}-v{version.version}", version.version, folder)
