"""Brings versions into use: loads, proves and replaces them, and follows the champion's alias."""

from __future__ import annotations

import asyncio
import time
from collections import deque
from collections.abc import Callable, Coroutine
from contextlib import suppress
from pathlib import Path
from typing import Any

import httpx

from qwen3ft.config import TrainingConfig
from qwen3ft.errors import FinetuneError, RequestError, TransientError
from qwen3ft.files import write_json_atomic
from qwen3ft.jobs.folders import RunDir
from qwen3ft.logs import get_logger
from qwen3ft.model.saved_adapter import open_adapter
from qwen3ft.records.evaluation import Champion
from qwen3ft.records.serving import Prompting
from qwen3ft.registry.aliases import CHAMPION
from qwen3ft.registry.moves import Change, this_server
from qwen3ft.registry.registry import Registry
from qwen3ft.server.engines import Engine
from qwen3ft.server.front import PROBE_HEADER, Front
from qwen3ft.server.probe import prove, read_kept_answers
from qwen3ft.server.served import Version
from qwen3ft.server.sources import Source, source_of
from qwen3ft.server.trial import Trial
from qwen3ft.serving.prompting import trained_prompting

logger = get_logger("server")

FOLLOW_SECONDS = 2.0
"""Time between two looks at the champion's alias."""

TRIAL_FILE = "trial.json"
"""File in a run's folder: the outcome of its adapter's trial."""

MOST_RESTARTS, RESTART_SECONDS = 3, 3600.0
"""Times within an hour that a lost engine is started again; then the server gives up."""


class Manager:
    """Keeps the front's default version what it should be.

    Args:
        front: The server.
        config: Settings of this machine.
        registry: Where the champion is looked up.
        make_engine: Makes an engine for the base of the adapter in a folder.
        probe_rows: Held-out rows to compare each version on; 0 for none.
        trial_share: Share of the requests that a new champion gets until it has stood its trial;
            0 for no trial.
    """

    def __init__(
        self,
        front: Front,
        config: TrainingConfig,
        registry: Registry,
        make_engine: Callable[[Path], Engine],
        probe_rows: int,
        trial_share: float = 0.0,
    ) -> None:
        self.trial_share = trial_share
        self.front, self.served, self.config = front, front.served, config
        self.registry, self.make_engine, self.probe_rows = registry, make_engine, probe_rows
        self.engine: Engine | None = None  # that of the default version
        self._engines: set[Engine] = set()  # every one that was made and is not closed
        self._loading = asyncio.Lock()
        self._loading_on: Engine | None = None
        self._refused: str | None = None  # version of the last champion that was not brought up
        self._lost_with: str | None = None  # that with which an engine was lost
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

    async def follow(self, registered_model: str, client: httpx.AsyncClient) -> None:
        """Bring every new champion into use, for ever; trouble leaves the old one there."""
        reachable = True
        while True:
            await asyncio.sleep(FOLLOW_SECONDS)
            if self.served.default is None:
                continue  # the engine is started again, with the version that was in use
            try:
                champion = await asyncio.to_thread(self.registry.champion, registered_model)
                if champion is not None and self._is_new(champion):
                    await self._follow_to(champion, client)
                reachable = True
            except (FinetuneError, OSError) as error:
                if reachable:  # said once, not every two seconds
                    logger.warning("the champion cannot be followed: %s", error)
                reachable = False

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

    def _is_new(self, champion: Champion) -> bool:
        default = self.served.default
        in_use = default.number if default is not None else None
        if champion.version == in_use:
            self._refused = None
        return champion.version not in (in_use, self._refused)

    async def _follow_to(self, champion: Champion, client: httpx.AsyncClient) -> None:
        """Bring a new champion into use, or say why not, once."""
        result, engine = "used", self.engine
        try:
            source = await asyncio.to_thread(source_of, self.config, self.registry, champion)
            version = await self.bring_up(source, client)
            if self.trial_share and self.served.default is not None:
                try:
                    result = await self._try(self.served.default, version, champion)
                    if result == "withdrawn" and version.engine.lost.done():
                        raise version.engine.lost.result()
                except (FinetuneError, OSError):
                    self.retire(version)
                    raise
        except TransientError:
            raise  # the next look tries again
        except FinetuneError as error:
            is_lost = engine is None or engine.lost.done()
            if is_lost and self._lost_with != champion.version:
                self._lost_with = champion.version
                return  # it may be chance; `watch_engine` starts another engine
            self._refused = champion.version
            self.front.metrics.changes.labels("refused").inc()
            logger.error("version %s is not served: %s", champion.version, error)
            return
        self.front.metrics.changes.labels(result).inc()
        if result == "used":
            self.make_default(version)
            logger.info("%s answers from now on (%s)", version.name, CHAMPION)
        else:
            self.retire(version)

    async def _try(self, old: Version, new: Version, champion: Champion) -> str:
        """Give a new version its share of the requests; return 'used', or why it is not used.

        One that is worse is rolled back in the registry too. The outcome is kept as a tag of the
        version, and beside the card of its run.
        """
        trial = Trial(old, new, self.trial_share)
        logger.info("%s is on trial with %.0f %% of the requests", new.name, 100 * trial.share)
        self.front.observers.append(trial.observe)
        self.served.assign = trial.assign
        try:
            is_current = True
            while is_current and not trial.decided.is_set():
                with suppress(TimeoutError):
                    await asyncio.wait_for(trial.decided.wait(), FOLLOW_SECONDS)
                is_current = await self._is_on_trial(new, champion)
        finally:
            self.served.assign = None
            self.front.observers.remove(trial.observe)
        result = "rolled_back" if trial.objection else "used" if is_current else "withdrawn"
        outcome = f"{result.replace('_', ' ')} after {trial.summary()}"
        logger.info("%s: %s", new.name, outcome)
        if trial.objection:
            self._refused = champion.version
            reason = f"on trial with {trial.share:.0%} of the requests: {trial.summary()}"
            await asyncio.to_thread(self._roll_back, champion, old, reason)
        await asyncio.to_thread(self._keep_outcome, new, champion, outcome)
        return result

    async def _is_on_trial(self, version: Version, champion: Champion) -> bool:
        """Return False once the champion is another one, or the version's engine is lost."""
        if version.name not in self.served.versions or version.engine.lost.done():
            return False
        try:
            now = await asyncio.to_thread(self.registry.champion, champion.registered_model)
        except TransientError:
            return True  # MLflow is away; the trial goes on
        return now is not None and now.version == champion.version

    def _roll_back(self, champion: Champion, old: Version, reason: str) -> None:
        """Make the old version the champion again, if it is the previous one."""
        try:
            previous = self.registry.history(champion.registered_model).aliases.previous
            if previous is not None and previous == old.number:
                change = Change(by=this_server(), reason=reason)
                self.registry.rollback(champion.registered_model, change)
                return
            logger.error(
                "the champion stays %s, as the version before it is not %s; next: qwen3ft rollback",
                *(champion.version, old.name),
            )
        except FinetuneError as error:
            logger.error("the champion stays %s: %s", champion.version, error)

    def _keep_outcome(self, version: Version, champion: Champion, outcome: str) -> None:
        """Keep the outcome of a trial in MLflow, and in the run's folder if it is here."""
        run = RunDir(Path(self.config.runs_dir) / version.provenance["run_id"])
        try:
            if run.path.is_dir():
                write_json_atomic(
                    run.path / TRIAL_FILE, {"version": version.name, "trial": outcome}
                )
            self.registry.note_trial(champion.registered_model, champion.version, outcome)
        except (FinetuneError, OSError) as error:
            logger.warning("the outcome of the trial is not kept: %s", error)

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
                except RequestError as error:
                    logger.info("a new engine is started: %s", error.what)
                    engine = None
            if engine is None:
                engine = self.make_engine(source.folder)
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
        kept = await asyncio.to_thread(read_kept_answers, self.config, run_id, self.probe_rows)
        thinking = trained_prompting(version.provenance).thinking
        same = await prove(client, version.name, kept, thinking, version.engine.name)
        logger.info("%s: %.1f %% of %d answers as in its test", version.name, 100 * same, len(kept))

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
    limits = httpx.Limits(max_connections=16, max_keepalive_connections=0)
    return httpx.AsyncClient(base_url=address, headers=headers, limits=limits, trust_env=False)
