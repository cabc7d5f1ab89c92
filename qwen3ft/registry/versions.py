"""Versions of a registered model: made once for each run's adapter, and found again."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any

from qwen3ft.errors import ConfigError, NotInMlflowError
from qwen3ft.records.evaluation import Champion
from qwen3ft.registry.aliases import DIGEST_TAG, RUN_TAG
from qwen3ft.tracking.tracking import Connection

if TYPE_CHECKING:
    from qwen3ft.config import TrainingConfig

ADAPTER_PATH = "adapter"
"""Where a run's adapter lies among its artifacts."""


def registered_model_name(model_name: str) -> str:
    """A registry name for a model: its last two path parts, without what MLflow forbids."""
    parts = [part for part in re.split(r"[/\\:]+", model_name) if part not in ("", ".", "..")]
    return f"qwen3ft-{'--'.join(parts[-2:]) or 'model'}"


def registered_name(config: TrainingConfig) -> str:
    """The registry's name for a run's adapters: as configured, or after the base model."""
    return config.registered_model or registered_model_name(config.model_name)


def checked_name(name: str) -> str:
    """`name`; ConfigError if the registry cannot hold it."""
    if re.fullmatch(r"[^/:'\"\\]+", name):
        return name
    raise ConfigError(
        f"{name!r} cannot be the name of a registered model.",
        why="MLflow's registry takes no '/', ':' or quotes in a name.",
        next_command="qwen3ft plan --help",
    )


def register(connection: Connection, name: str, run_id: str, tags: dict[str, str]) -> str:
    """The version of a run's adapter, made if there is none of the same digest."""
    with connection.calls() as client:
        if not client.search_registered_models(f"name = '{name}'"):
            client.create_registered_model(name)
        for version in client.search_model_versions(f"name = '{name}'"):
            if version.run_id == run_id and version.tags.get(DIGEST_TAG) == tags[DIGEST_TAG]:
                return str(version.version)
        source = f"runs:/{run_id}/{ADAPTER_PATH}"
        made = client.create_model_version(
            name, source, run_id=run_id, tags=tags, await_creation_for=0
        )
    return str(made.version)


def find_version(connection: Connection, name: str, alias_or_number: str) -> Champion | None:
    """The version of that number or alias, or None."""
    try:
        with connection.calls() as client:
            aliases = client.get_registered_model(name).aliases
            number = aliases.get(alias_or_number, alias_or_number)
            if not str(number).isdigit():
                return None
            version = client.get_model_version(name, str(number))
    except NotInMlflowError:
        return None
    return described(name, version)


def find_by_run(connection: Connection, name: str, run: str) -> Champion | None:
    """The newest version that the run, by its own id or MLflow's, made."""
    with connection.calls() as client:
        found = [
            version
            for version in client.search_model_versions(f"name = '{name}'")
            if run in (version.run_id, version.tags.get(RUN_TAG))
        ]
    newest = max(found, key=lambda version: int(version.version), default=None)
    return None if newest is None else described(name, newest)


def described(name: str, version: Any) -> Champion:
    """MLflow's record of a version as ours."""
    return Champion(
        registered_model=name,
        version=str(version.version),
        source_uri=str(version.source),
        tags={str(key): str(value) for key, value in version.tags.items()},
        adapter_path=None,
    )
