"""Follows the champion's alias: each new champion comes into use, after a trial if wanted."""

from __future__ import annotations

import asyncio
import time
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import httpx

from qwen3ft.disk.files import write_json_atomic
from qwen3ft.errors import FinetuneError, TransientError
from qwen3ft.jobs.folders import RunDir
from qwen3ft.logs import get_logger
from qwen3ft.records.evaluation import Champion
from qwen3ft.registry.aliases import CHAMPION
from qwen3ft.registry.moves import Change, this_server
from qwen3ft.registry.registry import Registry
from qwen3ft.server.manager import Manager
from qwen3ft.server.served import Version
from qwen3ft.server.sources import source_of
from qwen3ft.server.trial import Trial

logger = get_logger("server")

FOLLOW_SECONDS = 1.0
"""Time between two looks at the champion's alias; a look takes 10 ms of CPU."""

TRIAL_FILE = "trial.json"
"""File in a run's folder: the outcome of its adapter's trial."""

HOUR_SECONDS = 3600


@dataclass(frozen=True)
class Canary:
    """Settings of the trials of new champions.

    Attributes:
        share: Share of the requests that a new champion gets on trial; 0 for no trial.
        hours: Time after which a trial ends in any case.
    """

    share: float = 0.0
    hours: float = 12.0


NO_TRIALS = Canary()


class ChampionFollower:
    """Keeps the champion in use.

    Args:
        manager: Brings versions into use.
        registry: Where the champion is looked up.
        registered_model: Name of the registered model.
        canary: Settings of trials.
    """

    def __init__(
        self, manager: Manager, registry: Registry, registered_model: str, canary: Canary
    ) -> None:
        self._manager, self._front, self._served = manager, manager.front, manager.served
        self._registry, self._model, self._canary = registry, registered_model, canary
        self._refused: str | None = None  # version of the last champion that was not brought up
        self._lost_with: str | None = None  # that with which an engine was lost

    async def follow(self, client: httpx.AsyncClient) -> None:
        """Bring every new champion into use, for ever; trouble leaves the old one there."""
        reachable = True
        while True:
            await asyncio.sleep(FOLLOW_SECONDS)
            if self._served.default is None:
                continue  # the engine is started again, with the version that was in use
            try:
                champion = await asyncio.to_thread(self._registry.champion, self._model)
                if champion is not None and self._is_new(champion):
                    await self._follow_to(champion, client)
                reachable = True
            except (FinetuneError, OSError) as error:
                if reachable:  # said once, not at every look
                    logger.warning("the champion cannot be followed: %s", error)
                reachable = False

    def _is_new(self, champion: Champion) -> bool:
        default = self._served.default
        in_use = default.number if default is not None else None
        if champion.version == in_use:
            self._refused = None
        return champion.version not in (in_use, self._refused)

    async def _follow_to(self, champion: Champion, client: httpx.AsyncClient) -> None:
        """Bring a new champion into use, or say why not, once."""
        manager, engine = self._manager, self._manager.engine
        result = "used"
        try:
            config = manager.config
            source = await asyncio.to_thread(source_of, config, self._registry, champion)
            version = await manager.bring_up(source, client)
            if self._canary.share and self._served.default is not None:
                try:
                    result = await self._try(self._served.default, version, champion)
                    if result == "withdrawn" and version.engine.lost.done():
                        raise version.engine.lost.result()
                except (FinetuneError, OSError):
                    manager.retire(version)
                    raise
        except TransientError:
            raise  # the next look tries again
        except FinetuneError as error:
            is_lost = engine is None or engine.lost.done()
            if is_lost and self._lost_with != champion.version:
                self._lost_with = champion.version
                return  # it may be chance; `watch_engine` starts another engine
            self._refused = champion.version
            self._front.metrics.changes.labels("refused").inc()
            logger.error("version %s is not served: %s", champion.version, error)
            return
        self._front.metrics.changes.labels(result).inc()
        if result == "used":
            manager.make_default(version)
            logger.info("%s answers from now on (%s)", version.name, CHAMPION)
        else:
            manager.retire(version)

    async def _try(self, old: Version, new: Version, champion: Champion) -> str:
        """Give a new version its share of the requests; return 'used', or why it is not used.

        One that is worse is rolled back in the registry too; one that nothing speaks against is
        used when the time is over. The outcome is kept as a tag of the version, and beside the card
        of its run.
        """
        trial = Trial(old, new, self._canary.share)
        until = time.monotonic() + HOUR_SECONDS * self._canary.hours
        logger.info("%s is on trial with %.0f %% of the requests", new.name, 100 * trial.share)
        self._front.observers.append(trial.observe)
        self._served.assign = trial.assign
        try:
            is_current, is_over = True, False
            while is_current and not is_over:
                left_seconds = max(0.0, until - time.monotonic())
                with suppress(TimeoutError):
                    await asyncio.wait_for(trial.decided.wait(), min(FOLLOW_SECONDS, left_seconds))
                is_over = trial.decided.is_set() or time.monotonic() >= until
                is_current = await self._is_on_trial(new, champion)
        finally:
            self._served.assign = None
            self._front.observers.remove(trial.observe)
        result = "rolled_back" if trial.objection else "used" if is_current else "withdrawn"
        if trial.objection:
            self._refused = champion.version
            reason = f"on trial with {trial.share:.0%} of the requests: {trial.summary()}"
            if not await asyncio.to_thread(self._roll_back, champion, old, reason):
                result = "withdrawn"  # not by this server
        outcome = f"{result.replace('_', ' ')} after {trial.summary()}"
        if result == "used" and not trial.decided.is_set():
            outcome += f"; the trial ended by its limit of {self._canary.hours:g} h"
        logger.info("%s: %s", new.name, outcome)
        await asyncio.to_thread(self._keep_outcome, new, champion, outcome)
        return result

    async def _is_on_trial(self, version: Version, champion: Champion) -> bool:
        """Return False once the champion is another one, or the version's engine is lost."""
        if version.name not in self._served.versions or version.engine.lost.done():
            return False
        try:
            now = await asyncio.to_thread(self._registry.champion, self._model)
        except TransientError:
            return True  # MLflow is away; the trial goes on
        return now is not None and now.version == champion.version

    def _roll_back(self, champion: Champion, old: Version, reason: str) -> bool:
        """Make the old version the champion again, if it is the previous one; False if it is not.

        Nothing is moved if somebody has moved the champion meanwhile.
        """
        try:
            aliases = self._registry.history(self._model).aliases
            if aliases.champion != champion.version:
                logger.info("%s is not the champion any more", champion.version)
                return False
            if aliases.previous is not None and aliases.previous == old.number:
                change = Change(by=this_server(), reason=reason)
                self._registry.rollback(self._model, change)
                return True
            logger.error(
                "the champion stays %s, as the version before it is not %s; next: qwen3ft rollback",
                *(champion.version, old.name),
            )
        except FinetuneError as error:
            logger.error("the champion stays %s: %s", champion.version, error)
        return False

    def _keep_outcome(self, version: Version, champion: Champion, outcome: str) -> None:
        """Keep the outcome of a trial in MLflow, and in the run's folder if it is here."""
        runs_dir = Path(self._manager.config.runs_dir)
        run = RunDir(runs_dir / version.provenance["run_id"])
        try:
            if run.path.is_dir():
                write_json_atomic(
                    run.path / TRIAL_FILE, {"version": version.name, "trial": outcome}
                )
            self._registry.note_trial(self._model, champion.version, outcome)
        except (FinetuneError, OSError) as error:
            logger.warning("the outcome of the trial is not kept: %s", error)
