"""The adapters that are served: which one answers a request, and when an old one may go.

A request belongs to one version from its beginning to its end, whatever is promoted meanwhile, and
its answer names that version.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from qwen3ft.server.engines import Engine

DEFAULT_NAMES = ("champion", "default", "qwen3ft")
"""Names that a request may give for the version in use, besides that of the registered model."""


@dataclass(eq=False)
class Version:
    """One adapter on an engine.

    Attributes:
        name: Name in requests and answers; no other adapter ever has it.
        number: Version in the registry; None for an adapter from a folder.
        folder: Its verified files.
        provenance: Base, data and settings of its run.
        engine: What it is loaded on.
        is_open: Requests may name it; before it is proven only the probe may.
        answering: Requests that it answers now.
    """

    name: str
    number: str | None
    folder: Path
    provenance: dict[str, Any]
    engine: Engine
    is_open: bool = False
    answering: int = 0
    idle: asyncio.Event = field(default_factory=asyncio.Event)

    def __post_init__(self) -> None:
        self.idle.set()

    @contextmanager
    def held(self) -> Iterator[None]:
        """Keep the version loaded within the body."""
        self.answering += 1
        self.idle.clear()
        try:
            yield
        finally:
            self.answering -= 1
            if self.answering == 0:
                self.idle.set()


class Served:
    """All versions that are loaded, and the one that answers by default.

    Args:
        registered_model: Name of the registered model, which requests may use.
    """

    def __init__(self, registered_model: str) -> None:
        self.default_names = (*DEFAULT_NAMES, registered_model)
        self.versions: dict[str, Version] = {}
        self.retiring: dict[str, Version] = {}
        self.default: Version | None = None
        self.assign: Callable[[], Version] | None = None
        """Chooses in place of `default` while a new version is on trial."""

    def find(self, name: str | None) -> Version | None:
        """Return the version that a request's `model` names; None if there is none."""
        if name is None or name in self.default_names:
            return self.default if self.assign is None else self.assign()
        return self.versions.get(name)

    async def retire(self, version: Version) -> None:
        """Give a version no more requests; unload it once its answers have ended.

        It stays if it is taken back meanwhile (`revive`).
        """
        self.versions.pop(version.name, None)
        self.retiring[version.name] = version
        await version.idle.wait()
        if self.retiring.pop(version.name, None) is not None:
            await version.engine.unload(version.name)

    def revive(self, name: str) -> Version | None:
        """Take back a version that still ends its answers; None if there is no such one."""
        version = self.retiring.pop(name, None)
        if version is not None:
            self.versions[name] = version
        return version
