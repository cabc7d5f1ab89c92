"""What must outlive any cleaning: the versions that an alias points at, whatever its name.

champion, previous and challenger are aliases of MLflow's registry; one that an operator set by hand
protects its version as well.
"""

from __future__ import annotations

from pydantic import Field

from qwen3ft.records.base import Record
from qwen3ft.registry.aliases import RUN_TAG
from qwen3ft.tracking.tracking import Connection, connect


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
