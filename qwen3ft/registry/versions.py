"""Versions of a registered model: one for each run's adapter, created once and found again."""

from __future__ import annotations

from typing import Any

from pydantic import Field

from qwen3ft.config import checked_name
from qwen3ft.errors import NotInMlflowError
from qwen3ft.faults import reach
from qwen3ft.records.base import Record
from qwen3ft.records.evaluation import Champion
from qwen3ft.registry.aliases import CHAMPION, DIGEST_TAG, RUN_TAG
from qwen3ft.registry.moves import NO_VERDICT, Aliases, History, describe_history
from qwen3ft.tracking.connection import Connection, connect

ADAPTER_PATH = "adapter"
"""Path of a run's adapter among its artifacts."""


def checked_model(name: str) -> str:
    """Return `name`; raise ConfigError if it cannot be that of a registered model."""
    return checked_name(name, "registered model", "qwen3ft history")


def find_or_create_version(
    connection: Connection, name: str, run_id: str, tags: dict[str, str]
) -> str:
    """Return the version of a run's adapter, created if there is none with the same digest."""
    with connection.calls() as client:
        if not client.search_registered_models(f"name = '{name}'"):
            empty = History(registered_model=name, aliases=Aliases())
            client.create_registered_model(name, description=describe_history(empty))
        for version in client.search_model_versions(f"name = '{name}'"):
            if version.run_id == run_id and version.tags.get(DIGEST_TAG) == tags[DIGEST_TAG]:
                return str(version.version)
        source = f"runs:/{run_id}/{ADAPTER_PATH}"
        made = client.create_model_version(
            name,
            source,
            run_id=run_id,
            tags=tags,
            description=NO_VERDICT,
            await_creation_for=0,
        )
    reach("version.created")
    return str(made.version)


def find_version(connection: Connection, name: str, alias_or_number: str) -> Champion | None:
    """Return the version with that number or alias, or None."""
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
    """Return the newest version made by the run, given its own id or MLflow's."""
    with connection.calls() as client:
        found = [
            version
            for version in client.search_model_versions(f"name = '{name}'")
            if run in (version.run_id, version.tags.get(RUN_TAG))
        ]
    newest = max(found, key=lambda version: int(version.version), default=None)
    return None if newest is None else to_champion(name, newest)


def find_run_settings(connection: Connection, run_id: str) -> dict[str, str]:
    """Return the parameters of an MLflow run; empty if there is no such run."""
    try:
        with connection.calls() as client:
            return dict(client.get_run(run_id).data.params)
    except NotInMlflowError:
        return {}


def set_tag(connection: Connection, name: str, version: str, tag: str, text: str) -> None:
    """Set a tag of a version."""
    with connection.calls() as client:
        client.set_model_version_tag(name, version, tag, text)


def to_champion(name: str, version: Any) -> Champion:
    """Convert MLflow's record of a version."""
    return Champion(
        registered_model=name,
        version=str(version.version),
        source_uri=str(version.source),
        tags={str(key): str(value) for key, value in version.tags.items()},
        adapter_path=None,
    )


class ProtectedVersion(Record):
    """A version that an alias points at."""

    registered_model: str
    version: str
    aliases: tuple[str, ...]
    run_id: str | None = Field(description="Run that trained it; None if unknown.")

    def describe(self) -> str:
        """Return model, version and aliases as text."""
        return f"{self.registered_model} v{self.version} ({', '.join(self.aliases)})"


def find_protected(tracking_uri: str) -> list[ProtectedVersion]:
    """Return every version of every registered model that has an alias.

    Raises:
        TrackingUnavailableError: MLflow cannot be reached, so nothing may be removed.
    """
    connection = connect(tracking_uri)
    return [
        _protected(connection, name, version, aliases)
        for name, versions in _aliases(connection).items()
        for version, aliases in versions.items()
    ]


def find_in_use(connection: Connection) -> list[str]:
    """Return the names of the registered models that have a champion, sorted."""
    return sorted(
        name
        for name, versions in _aliases(connection).items()
        if any(CHAMPION in aliases for aliases in versions.values())
    )


def _aliases(connection: Connection) -> dict[str, dict[str, list[str]]]:
    """Return the aliases by registered model and version."""
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


def _protected(
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
