"""MLflow's model registry as the place where adapters are promoted: register, fetch, move.

A version is only made of bytes that MLflow returned with the right sha256, and a champion is only
handed out after the same check. Every step may be repeated after a crash. Nothing is unpickled or
executed: a version's MLmodel, for others to load it with, names a module and no more.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Mapping
from contextlib import suppress
from functools import partial
from pathlib import Path

from qwen3ft.config import checked_name, registered_model_name
from qwen3ft.disk.files import sha256_file
from qwen3ft.disk.manifests import build_folder, read_manifest_facts
from qwen3ft.errors import (
    ModelNotFoundError,
    NotInMlflowError,
    RejectedError,
    SaveError,
    TrackingUnavailableError,
)
from qwen3ft.model.adapter_checks import ADAPTER_FILE
from qwen3ft.model.saved_adapter import OpenedAdapter, copy_adapter, open_adapter
from qwen3ft.records.evaluation import Champion
from qwen3ft.records.model import SavedAdapter
from qwen3ft.registry import aliases
from qwen3ft.registry.aliases import CHAMPION, DIGEST_TAG, TRIAL_TAG
from qwen3ft.registry.bounded_calls import BoundedCalls
from qwen3ft.registry.moves import Change, History, Move, Mover
from qwen3ft.registry.versions import (
    ADAPTER_PATH,
    checked_model,
    find_by_run,
    find_in_use,
    find_or_create_version,
    find_run_settings,
    find_version,
    set_tag,
    to_champion,
)
from qwen3ft.tracking.connection import Connection

ROLLBACK_SECONDS = 50.0
"""Longest rollback; with the start of the command it stays within the promised minute."""

TRANSFER_SECONDS = 1800.0
"""Longest transfer of one adapter when nobody waits for it."""

BY_A_PROGRAM = Change(by=Mover(kind="flow", name="unnamed"))
"""Author of a promotion whose caller does not name one."""


class Registry:
    """The registry of one MLflow.

    Every method raises TrackingUnavailableError if MLflow does not answer in time, and ConfigError
    for a name that the registry cannot hold.

    Args:
        tracking_uri: Address of MLflow.
        deadline_seconds: Longest time for any step except the transfer of files.
    """

    def __init__(self, tracking_uri: str, *, deadline_seconds: float = 30.0) -> None:
        self.deadline_seconds = deadline_seconds
        self._calls = BoundedCalls(tracking_uri)

    def register(self, run_id: str, saved: SavedAdapter, tags: Mapping[str, str]) -> str:
        """Make a version of the adapter among the artifacts of the MLflow run `run_id`.

        Returns:
            The version; the earlier one if this run's adapter is already registered.

        Raises:
            SaveError: MLflow holds other bytes than `saved`.
            TrackingUnavailableError: also if the adapter is not there (yet); see
                `qwen3ft.tracking.cursor.wait_until_sent`.
        """
        name = checked_model(saved.registered_model or registered_model_name(saved.model_name))
        with tempfile.TemporaryDirectory(prefix="qwen3ft-") as folder:
            self._fetch(run_id, saved.sha256, Path(folder))
        all_tags = {**tags, DIGEST_TAG: saved.sha256}
        return self._calls.within(
            self.deadline_seconds, find_or_create_version, name, run_id, all_tags
        )

    def champion(self, registered_model: str) -> Champion | None:
        """Return the version in use, or None if there is none yet."""
        return self.version(registered_model, CHAMPION)

    def version(self, registered_model: str, alias_or_number: str) -> Champion | None:
        """Return the version with that number or alias, or None."""
        name = checked_model(registered_model)
        return self._calls.within(self.deadline_seconds, find_version, name, alias_or_number)

    def version_of_run(self, registered_model: str, run: str) -> Champion | None:
        """Return the newest version made by a run, given its folder's id or its MLflow id."""
        name = checked_model(registered_model)
        return self._calls.within(self.deadline_seconds, find_by_run, name, run)

    def settings_of(self, version: Champion) -> dict[str, str]:
        """Return the settings of the run that made a version, as text; empty if it is gone."""
        run_id = _run_id(version)
        return self._calls.within(self.deadline_seconds, find_run_settings, run_id)

    def run_card(self, registered_model: str, run: str, folder: Path) -> Path | None:
        """Fetch the card of the run that made a version into `folder`; None if there is none."""
        version = self.version_of_run(registered_model, run)
        if version is None:
            return None
        with suppress(NotInMlflowError, RejectedError):
            run_id = _run_id(version)
            return self._calls.within(
                self.deadline_seconds, Connection.download, run_id, "card/card.json", folder
            )
        return None

    def in_use(self) -> list[str]:
        """Return the names of the registered models that have a champion."""
        return self._calls.within(self.deadline_seconds, find_in_use)

    def history(self, registered_model: str) -> History:
        """Return the versions in use, and every promotion and rollback so far."""
        name = checked_model(registered_model)
        return self._calls.within(self.deadline_seconds, aliases.read_history, name)

    def download(self, champion: Champion, target: Path) -> Path:
        """Fetch the champion's adapter into the folder `target`, all or nothing.

        A complete and undamaged `target` with the right bytes is kept as it is.

        Raises:
            SaveError: the version has no digest, or MLflow holds other bytes.
        """
        digest = champion.tags.get(DIGEST_TAG, "")
        weights = target / ADAPTER_FILE
        with suppress(ModelNotFoundError, SaveError):  # then it is fetched again
            open_adapter(target)
            if sha256_file(weights) == digest:
                return target
        with tempfile.TemporaryDirectory(prefix="qwen3ft-") as folder:
            fetched = self._fetch(_run_id(champion), digest, Path(folder))
            build_folder(
                target, partial(copy_adapter, fetched), read_manifest_facts(fetched.folder)
            )
        return target

    def promote(
        self,
        registered_model: str,
        version: str,
        expected: str | None,
        change: Change = BY_A_PROGRAM,
    ) -> Move | None:
        """Make `version` the champion if the champion still is `expected` (None: there is none).

        The old champion becomes "previous". Promoting the champion again changes nothing and
        returns None.

        Raises:
            ChampionChangedError: another version is the champion now.
            RolledBackError: a flow would promote an adapter that was rolled back.
            RequestError: there is no such version.
        """
        name = checked_model(registered_model)
        return self._calls.move(
            self.deadline_seconds, aliases.make_champion, name, version, expected, change
        )

    def set_challenger(self, registered_model: str, version: str, verdict: str) -> bool:
        """Give the alias "challenger" to a version that was tested and not promoted.

        Returns:
            False for the champion and for a version that was rolled back, which do not get it.
        """
        name = checked_model(registered_model)
        return self._calls.move(
            self.deadline_seconds, aliases.set_challenger, name, version, verdict
        )

    def note_trial(self, registered_model: str, version: str, outcome: str) -> None:
        """Keep the outcome of a version's trial as a tag."""
        name = checked_model(registered_model)
        self._calls.within(self.deadline_seconds, set_tag, name, version, TRIAL_TAG, outcome)

    def rollback(self, registered_model: str, change: Change, *, verify: bool = True) -> Move:
        """Make the previous version the champion again, or fail, within `ROLLBACK_SECONDS`.

        If MLflow does not answer in time, the move may still happen: see `qwen3ft history`.

        Args:
            registered_model: Name of the model.
            change: Author and reason.
            verify: First fetch the previous version's adapter and compare it with its sha256.

        Raises:
            RequestError: nothing was in use before.
            SaveError: the previous version's adapter differs from what was saved.
            ChampionChangedError: an alias was moved meanwhile.
        """
        name = checked_model(registered_model)
        deadline = time.monotonic() + ROLLBACK_SECONDS

        def left_seconds() -> float:
            return max(0.1, min(self.deadline_seconds, deadline - time.monotonic()))

        now = self._calls.within(left_seconds(), aliases.read_history, name).aliases
        if now.champion is None or now.previous is None:
            raise aliases.nothing_before(name, now.champion)
        target = now.previous
        if verify:
            found = self._calls.within(left_seconds(), aliases.require_version, name, target)
            self.check(to_champion(name, found), left_seconds())
        return self._calls.move(
            left_seconds(), aliases.restore_previous, name, target, now.champion, change
        )

    def check(self, version: Champion, seconds: float = TRANSFER_SECONDS) -> tuple[str, ...]:
        """Fetch a version's adapter within `seconds` and compare it with its sha256.

        Returns:
            Ways in which its run was degraded; usually none.

        Raises:
            SaveError: the version has no digest, or MLflow holds other bytes.
        """
        digest = version.tags.get(DIGEST_TAG, "")
        with tempfile.TemporaryDirectory(prefix="qwen3ft-") as folder:
            fetched = self._fetch(_run_id(version), digest, Path(folder), seconds)
            return tuple(fetched.provenance["degraded"])

    def _fetch(
        self, run_id: str, digest: str, folder: Path, seconds: float = TRANSFER_SECONDS
    ) -> OpenedAdapter:
        """Download a run's adapter, compare its sha256 with `digest`, and open it."""
        deadline = time.monotonic() + seconds
        first = min(self.deadline_seconds, seconds)
        self._calls.within(first, Connection.has_run, run_id)
        try:
            left_seconds = max(0.1, deadline - time.monotonic())
            fetched = self._calls.within(
                left_seconds, Connection.download, run_id, ADAPTER_PATH, folder
            )
            found = sha256_file(fetched / ADAPTER_FILE)
        except (NotInMlflowError, RejectedError, OSError) as error:
            raise TrackingUnavailableError(
                f"MLflow run {run_id} holds no adapter (yet).",
                why="Its upload is not complete, or was refused; see the run's log.",
                next_command="qwen3ft sync",
            ) from error
        if found != digest:
            raise _not_as_saved(run_id, f"the adapter in MLflow has sha256 {found[:16]}", digest)
        try:
            return open_adapter(fetched)
        except (ModelNotFoundError, SaveError) as error:
            problem = error.what.replace(str(fetched), ADAPTER_PATH).rstrip(".")
            raise _not_as_saved(run_id, problem, digest) from error


def _run_id(version: Champion) -> str:
    run_id = version.source_uri.removeprefix("runs:/").partition("/")[0]
    return checked_name(run_id, "run of MLflow", "qwen3ft history")


def _not_as_saved(run_id: str, problem: str, digest: str) -> SaveError:
    return SaveError(
        f"The adapter of MLflow run {run_id} is refused: {problem}.",
        why=f"It was cut off or changed since it was saved (sha256 {digest[:16] or 'unknown'}).",
        next_command="qwen3ft sync",
        run_id=run_id,
        sha256=digest,
    )
