"""Versions of a registered model: made once for each run's adapter, and found again."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any

from pydantic import Field

from qwen3ft.errors import ConfigError, NotInMlflowError
from qwen3ft.records.base import Record
from qwen3ft.records.evaluation import Champion
from qwen3ft.registry.aliases import DIGEST_TAG, RUN_TAG
from qwen3ft.tracking.connection import Connection, connect

if TYPE_CHECKING:
    pass

ADAPTER_PATH = "adapter"
"""Where a run's adapter lies among its artifacts."""


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
    return to_champion(name, version)


def find_by_run(connection: Connection, name: str, run: str) -> Champion | None:
    """The newest version that the run, by its own id or MLflow's, made."""
    with connection.calls() as client:
        found = [
            version
            for version in client.search_model_versions(f"name = '{name}'")
            if run in (version.run_id, version.tags.get(RUN_TAG))
        ]
    newest = max(found, key=lambda version: int(version.version), default=None)
    return None if newest is None else to_champion(name, newest)


def to_champion(name: str, version: Any) -> Champion:
    """MLflow's record of a version as ours."""
    return Champion(
        registered_model=name,
        version=str(version.version),
        source_uri=str(version.source),
        tags={str(key): str(value) for key, value in version.tags.items()},
        adapter_path=None,
    )


class ProtectedVersion(Record):
    """One version in use."""

    registered_model: str
    version: str
    aliases: tuple[str, ...]
    run_id: str | None = Field(description="The run that trained it; None if it is not known.")

    def describe(self) -> str:
        """Model, version and what it is used as."""
        return f"{self.registered_model} v{self.version} ({', '.join(self.aliases)})"


def find_protected(tracking_uri: str) -> list[ProtectedVersion]:
    """Every version of every registered model that has an alias.

    Raises:
        TrackingUnavailableError: MLflow cannot be reached, so nothing may be removed.
    """
    connection = connect(tracking_uri)
    return [
        _describe(connection, name, version, aliases)
        for name, versions in _aliases(connection).items()
        for version, aliases in versions.items()
    ]


def _aliases(connection: Connection) -> dict[str, dict[str, list[str]]]:
    """Registered model: version: its aliases."""
    found: dict[str, dict[str, list[str]]] = {}
    token = None
    with connection.calls() as client:
        while True:
            page = client.search_registered_models(page_token=token)
            for model in page:
                for alias, version in client.get_registered_model(model.name).aliases.items():
                    found.setdefault(model.name, {}).setdefault(str(version), []).append(alias)
            token = page.token
            if not token:
                return found


def _describe(
    connection: Connection, name: str, version: str, aliases: list[str]
) -> ProtectedVersion:
    with connection.calls() as client:
        tags = client.get_model_version(name, version).tags
    return ProtectedVersion(
        registered_model=name,
        version=version,
        aliases=tuple(sorted(aliases)),
        run_id=tags.get(RUN_TAG),
    )
