"""Brings versions into use: loads them on an engine, proves and replaces them."""

from __future__ import annotations

import asyncio
import time
from collections import deque
from collections.abc import Callable, Coroutine
from pathlib import Path
from typing import Any

import httpx

from qwen3ft.config import TrainingConfig
from qwen3ft.errors import FinetuneError, NoPlaceError
from qwen3ft.logs import get_logger
from qwen3ft.model.saved_adapter import open_adapter
from qwen3ft.records.serving import Prompting
from qwen3ft.server.engines import Engine
from qwen3ft.server.front import PROBE_HEADER, Front
from qwen3ft.server.probe import prove, read_kept_test
from qwen3ft.server.served import Version
from qwen3ft.server.sources import Source
from qwen3ft.serving.prompting import trained_prompting

logger = get_logger("server")

MOST_RESTARTS, RESTART_SECONDS = 3, 3600.0
"""Times within an hour that a lost engine is started again; then the server gives up."""


class Manager:
    """Keeps the front's default version what it should be.

    Args:
        front: The server.
        config: Settings of this machine.
        make_engine: Makes an engine for the base of the adapter in a folder.
        probe_rows: Held-out rows to compare each version on; 0 for none.
    """

    def __init__(
        self,
        front: Front,
        config: TrainingConfig,
        make_engine: Callable[[Path], Engine],
        probe_rows: int,
    ) -> None:
        self.front, self.served, self.config = front, front.served, config
        self.make_engine, self.probe_rows = make_engine, probe_rows
        self.engine: Engine | None = None  # that of the default version
        self._engines: set[Engine] = set()  # every one that was made and is not closed
        self._loading = asyncio.Lock()
        self._loading_on: Engine | None = None
        self._leaving: set[asyncio.Task[None]] = set()
        self._lost_at: deque[float] = deque(maxlen=MOST_RESTARTS + 1)

    async def use(self, source: Source, client: httpx.AsyncClient) -> Version:
        """Load and prove an adapter, then make it the default; the old one ends its answers.

        Raises:
            FinetuneError: it cannot be loaded, or does not answer as tested. The old one stays.
        """
        version = await self.bring_up(source, client)
        self.make_default(version)
        return version

    async def bring_up(self, source: Source, client: httpx.AsyncClient) -> Version:
        """Load and prove an adapter."""
        version = self.served.revive(source.name) or await self._load(source)
        try:
            if not version.is_open:
                await self._prove(version, client)
        except FinetuneError:
            self.retire(version)
            raise
        version.is_open = True
        return version

    def make_default(self, version: Version) -> None:
        """Let `version` answer from now on."""
        old, self.served.default = self.served.default, version
        self.engine = version.engine
        self.front.metrics.use(version.name)
        if old is not None and old is not version:
            self.retire(old)

    def retire(self, version: Version) -> None:
        """Let a version end its answers, and its engine if nothing else is on it."""

        async def leave() -> None:
            await self.served.retire(version)
            await self._close_unused(version.engine)

        self._start(leave())

    async def wait_for_leaving(self) -> None:
        """Wait until all that was retired has ended, with the engines that nothing else is on."""
        await asyncio.gather(*self._leaving)

    async def watch_engine(self, client: httpx.AsyncClient) -> None:
        """Start the engine again whenever it is lost.

        Raises:
            FinetuneError: the reason, once it was lost too often.
        """
        while True:
            engine = self.engine
            assert engine is not None
            error = await asyncio.shield(engine.lost)
            if engine is not self.engine:
                continue  # it was replaced, and ended in order
            lost = self.served.default
            self._lost_at.append(time.monotonic())
            self.served.default = None
            self.served.versions.clear()
            self.served.assign = None
            spanned_seconds = self._lost_at[-1] - self._lost_at[0]
            too_often = len(self._lost_at) > MOST_RESTARTS and spanned_seconds < RESTART_SECONDS
            if lost is None or too_often:
                raise error
            logger.error("the engine is lost and started again: %s", error)
            self.engine = None
            await self._close(engine)
            await self.use(Source(lost.name, lost.number, lost.folder), client)

    async def close(self) -> None:
        """End the engines."""
        for task in self._leaving:
            task.cancel()
        await asyncio.gather(*(self._close(engine) for engine in tuple(self._engines)))

    async def _load(self, source: Source) -> Version:
        """Load an adapter on the engine, or on a new one if it does not go with the others."""
        opened = await asyncio.to_thread(open_adapter, source.folder)
        prompting = trained_prompting(opened.provenance)
        async with self._loading:
            engine = self.engine or self._other_engine()
            if engine is not None:
                while len(self._on(engine)) >= engine.places:
                    await asyncio.wait(self._leaving, return_when=asyncio.FIRST_COMPLETED)
                try:
                    await self._load_on(engine, source, prompting)
                except NoPlaceError as error:
                    logger.warning(
                        "another engine is started beside the first, with as much memory again "
                        "(%s); if there is none, restart the server: qwen3ft serve",
                        error.what,
                    )
                    engine = None
            if engine is None:
                engine = await asyncio.to_thread(self.make_engine, source.folder)
                self._engines.add(engine)
                try:
                    await engine.start()
                except (FinetuneError, OSError):
                    await self._close(engine)
                    raise
                await self._load_on(engine, source, prompting)
            version = Version(source.name, source.number, source.folder, opened.provenance, engine)
            self.served.versions[version.name] = version
        return version

    async def _load_on(self, engine: Engine, source: Source, prompting: Prompting) -> None:
        """Load an adapter on an engine, which stays open meanwhile."""
        self._loading_on = engine
        try:
            await engine.load(source.name, source.folder, prompting)
        except FinetuneError:
            self._loading_on = None
            await self._close_unused(engine)
            raise
        finally:
            self._loading_on = None

    def _other_engine(self) -> Engine | None:
        """Return the engine of a version that is not the default yet, if there is one."""
        engines = (version.engine for version in self.served.versions.values())
        return next((engine for engine in engines if not engine.lost.done()), None)

    async def _close_unused(self, engine: Engine) -> None:
        """Close an engine that is not needed any more."""
        if engine not in (self.engine, self._loading_on) and not self._on(engine):
            await self._close(engine)

    async def _close(self, engine: Engine) -> None:
        await engine.close()
        self._engines.discard(engine)

    async def _prove(self, version: Version, client: httpx.AsyncClient) -> None:
        if not self.probe_rows:
            logger.warning("%s was not compared with its test", version.name)
            return
        run_id = version.provenance["run_id"]
        test = await asyncio.to_thread(read_kept_test, self.config, run_id, self.probe_rows)
        thinking = trained_prompting(version.provenance).thinking
        # what is asked goes ahead of the clients, so half of the slots are left to them
        slots = version.engine.slots
        at_once = slots if self.served.default is None else max(1, slots // 2)
        engine = (version.engine.name, version.engine.device)
        likeness = await prove(client, version.name, test, thinking, *engine, at_once)
        logger.info("%s answers as in its test: %s", version.name, likeness)

    def _on(self, engine: Engine) -> list[Version]:
        loaded = (*self.served.versions.values(), *self.served.retiring.values())
        return [version for version in loaded if version.engine is engine]

    def _start(self, work: Coroutine[Any, Any, None]) -> None:
        task = asyncio.create_task(work)
        self._leaving.add(task)
        task.add_done_callback(self._leaving.discard)


def probing_client(front: Front, address: str, key: str) -> httpx.AsyncClient:
    """Return a client of this very server that may ask versions on trial."""
    headers = {PROBE_HEADER: front.probe_secret}
    if key:
        headers["Authorization"] = f"Bearer {key}"
    # no connection is kept: the server might close it just when the next probe begins
    limits = httpx.Limits(max_connections=None, max_keepalive_connections=0)
    return httpx.AsyncClient(base_url=address, headers=headers, limits=limits, trust_env=False)
