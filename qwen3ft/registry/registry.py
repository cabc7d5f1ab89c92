"""MLflow's model registry as the place where adapters are promoted: register, fetch, move.

Guarantees: a version is only made of bytes that MLflow gave back with the right sha256, and a
champion is only handed out after the same check; every step may be repeated after a crash. No
MLflow flavor is used, so nothing is unpickled or executed. Aliases are moved in
`qwen3ft.registry.aliases`.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TypeVar

from qwen3ft.config import registered_model_name
from qwen3ft.errors import (
    FinetuneError,
    NotInMlflowError,
    RejectedError,
    SaveError,
    TrackingUnavailableError,
)
from qwen3ft.files import build_folder, find_damage, read_manifest_facts, sha256_file
from qwen3ft.locks import try_lock
from qwen3ft.logs import mask_secrets
from qwen3ft.model.saved_adapter import ADAPTER_FILE, read_degradations
from qwen3ft.records.evaluation import Champion
from qwen3ft.records.model import SavedAdapter
from qwen3ft.registry import aliases
from qwen3ft.registry.aliases import CHAMPION, DIGEST_TAG
from qwen3ft.registry.moves import Change, History, Move, Mover
from qwen3ft.registry.versions import (
    ADAPTER_PATH,
    checked_name,
    find_by_run,
    find_version,
    register,
    to_champion,
)
from qwen3ft.tracking.connection import Connection, connect, load_client
from qwen3ft.tracking.uri import database_path


@contextmanager
def promotion_lock(tracking_uri: str, wait_seconds: float) -> Iterator[None]:
    """One mover of aliases at a time on this machine.

    Raises:
        TrackingUnavailableError: another one has it for longer than `wait_seconds`.
    """
    database = database_path(tracking_uri)
    if database is not None and database.parent.is_dir():
        path = database.with_name(f"{database.name}.promote.lock")
    else:
        digest = hashlib.sha256(tracking_uri.encode()).hexdigest()[:16]
        path = Path(tempfile.gettempdir()) / f"qwen3ft-{os.getuid()}-{digest}.promote.lock"
    with try_lock(path, wait_seconds) as mine:
        if not mine:
            raise TrackingUnavailableError(
                f"Another process has been moving aliases for {wait_seconds:.0f} s.",
                why=f"It holds {path}; MLflow may be slow to answer it.",
                next_command="qwen3ft history",
            )
        yield


ROLLBACK_SECONDS = 50.0
"""How long a rollback may take in all; a minute is promised, start of the command included."""

TRANSFER_SECONDS = 1800.0
"""How long the transfer of one adapter may take where nobody waits for it."""

BY_A_PROGRAM = Change(by=Mover(kind="flow", name="unnamed"))
"""Who promotes where the caller does not say."""

__all__ = ["Registry"]

ResultT = TypeVar("ResultT")


class Registry:
    """The registry of one MLflow.

    Args:
        tracking_uri: Where MLflow is.
        deadline_seconds: How long any step but the transfer of files may take.

    Every method raises TrackingUnavailableError if MLflow cannot be reached within that time, and
    ConfigError for a name that the registry cannot hold.
    """

    def __init__(self, tracking_uri: str, *, deadline_seconds: float = 30.0) -> None:
        self.tracking_uri = tracking_uri
        self.deadline_seconds = deadline_seconds
        self._connection: Connection | None = None

    def register(self, run_id: str, saved: SavedAdapter, tags: Mapping[str, str]) -> str:
        """Make a version of the adapter that run `run_id` holds under `adapter`.

        Returns:
            The version; the one made earlier, if this run's adapter is already registered.

        Raises:
            SaveError: MLflow holds other bytes than `saved`.
            TrackingUnavailableError: also if the adapter is not there (yet); see
                `qwen3ft.tracking.cursor.wait_until_sent`.
        """
        name = checked_name(saved.registered_model or registered_model_name(saved.model_name))
        with tempfile.TemporaryDirectory(prefix="qwen3ft-") as folder:
            self._fetch(run_id, saved.sha256, Path(folder))
        all_tags = {**tags, DIGEST_TAG: saved.sha256}
        return self._within(
            self.deadline_seconds, lambda connection: register(connection, name, run_id, all_tags)
        )

    def champion(self, registered_model: str) -> Champion | None:
        """The version in use, or None if there is none yet."""
        return self.version(registered_model, CHAMPION)

    def version(self, registered_model: str, alias_or_number: str) -> Champion | None:
        """The version of that number or alias, or None if there is none."""
        name = checked_name(registered_model)
        return self._within(
            self.deadline_seconds,
            lambda connection: find_version(connection, name, alias_or_number),
        )

    def version_of_run(self, registered_model: str, run: str) -> Champion | None:
        """The newest version that a run made: by the id of its folder, or MLflow's."""
        name = checked_name(registered_model)
        return self._within(
            self.deadline_seconds, lambda connection: find_by_run(connection, name, run)
        )

    def history(self, registered_model: str) -> History:
        """What is in use, and every promotion and rollback so far."""
        name = checked_name(registered_model)
        return self._within(
            self.deadline_seconds, lambda connection: aliases.read_history(connection, name)
        )

    def download(self, champion: Champion, target: Path) -> Path:
        """Fetch the champion's adapter into the folder `target`, all or nothing.

        A complete and undamaged `target` with the right bytes is kept as it is.

        Raises:
            SaveError: the version has no digest, or MLflow holds other bytes.
        """
        digest = champion.tags.get(DIGEST_TAG, "")
        weights = target / ADAPTER_FILE
        if weights.is_file() and find_damage(target) is None and sha256_file(weights) == digest:
            return target
        with tempfile.TemporaryDirectory(prefix="qwen3ft-") as folder:
            fetched = self._fetch(_run_id(champion), digest, Path(folder))
            build_folder(
                target,
                lambda staging: _copy_content(fetched, staging),
                read_manifest_facts(fetched),
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

        The old champion becomes "previous". Promoting the champion again changes nothing and gives
        None.

        Raises:
            ChampionChangedError: another version is the champion now.
            RolledBackError: `change` is not a person's, and the adapter was rolled back.
            RequestError: there is no such version.
        """
        name = checked_name(registered_model)
        return self._move(
            lambda connection: aliases.promote(connection, name, version, expected, change),
            self.deadline_seconds,
        )

    def set_challenger(self, registered_model: str, version: str, verdict: str) -> bool:
        """Name a version that was tested and kept "challenger"; whether it got the name.

        Neither the champion nor a version that was rolled back gets it.
        """
        name = checked_name(registered_model)
        return self._move(
            lambda connection: aliases.set_challenger(connection, name, version, verdict),
            self.deadline_seconds,
        )

    def rollback(self, registered_model: str, change: Change, *, verify: bool = True) -> Move:
        """Make the previous version the champion again, or fail, within `ROLLBACK_SECONDS`.

        If MLflow does not answer in that time the move may still be made: see `qwen3ft history`.

        Args:
            registered_model: Its name.
            change: Who asks for it, and why.
            verify: Fetch the previous version's adapter first, and compare it with its sha256.

        Raises:
            RequestError: nothing was in use before.
            SaveError: the previous version's adapter is not what was saved.
            ChampionChangedError: an alias was moved meanwhile.
        """
        name = checked_name(registered_model)
        deadline = time.monotonic() + ROLLBACK_SECONDS

        def left_seconds() -> float:
            return max(0.1, min(self.deadline_seconds, deadline - time.monotonic()))

        now = self._within(
            left_seconds(), lambda connection: aliases.read_history(connection, name)
        ).aliases
        if now.champion is None or now.previous is None:
            raise aliases.nothing_before(name, now.champion)
        target = now.previous
        if verify:
            self.check(self._required(name, target, left_seconds()), left_seconds())
        return self._move(
            lambda connection: aliases.rollback(connection, name, target, now.champion, change),
            left_seconds(),
        )

    def check(self, version: Champion, seconds: float = TRANSFER_SECONDS) -> tuple[str, ...]:
        """Fetch a version's adapter within `seconds`, and compare it with its sha256.

        Returns:
            In what its run fell short of what was asked for; usually nothing.

        Raises:
            SaveError: the version has no digest, or MLflow holds other bytes.
        """
        digest = version.tags.get(DIGEST_TAG, "")
        with tempfile.TemporaryDirectory(prefix="qwen3ft-") as folder:
            fetched = self._fetch(_run_id(version), digest, Path(folder), seconds)
            return read_degradations(fetched)

    def _required(self, name: str, version: str, seconds: float) -> Champion:
        return self._within(
            seconds,
            lambda connection: to_champion(
                name, aliases.require_version(connection, name, version)
            ),
        )

    def _move(self, call: Callable[[Connection], ResultT], seconds: float) -> ResultT:
        """`call` under the lock, which it keeps until it ends, however long the caller waits."""

        def locked(connection: Connection) -> ResultT:
            # Half the time at most, so that nobody moves anything after the caller gave up.
            with promotion_lock(self.tracking_uri, seconds / 2):
                return call(connection)

        return self._within(seconds, locked)

    def _fetch(
        self, run_id: str, digest: str, folder: Path, seconds: float = TRANSFER_SECONDS
    ) -> Path:
        """Download a run's adapter and compare its sha256 with `digest`."""
        deadline = time.monotonic() + seconds
        first = min(self.deadline_seconds, seconds)
        self._within(first, lambda connection: connection.has_run(run_id))
        try:
            fetched = self._within(
                max(0.1, deadline - time.monotonic()),
                lambda connection: connection.download(run_id, ADAPTER_PATH, folder),
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
        if (fetched / "manifest.json").exists() and (damage := find_damage(fetched)):
            raise _not_as_saved(run_id, damage.replace(str(fetched), ADAPTER_PATH), digest)
        return fetched

    def _within(self, seconds: float, call: Callable[[Connection], ResultT]) -> ResultT:
        """The result of `call`, made in a thread that is left behind if it takes too long."""
        load_client()  # takes seconds the first time, and has nothing to do with the server
        outcome: list[ResultT] = []
        errors: list[FinetuneError] = []

        def work() -> None:
            try:
                if self._connection is None:
                    self._connection = connect(self.tracking_uri)
                outcome.append(call(self._connection))
            except FinetuneError as error:
                errors.append(error)

        thread = threading.Thread(target=work, name="mlflow-registry", daemon=True)
        thread.start()
        thread.join(seconds)
        if outcome:
            return outcome[0]
        self._connection = None
        if errors:
            raise errors[0]
        raise TrackingUnavailableError(
            f"MLflow at {mask_secrets(self.tracking_uri)} gave no answer in {seconds:.0f} s.",
            why="The server or database is down, locked or overloaded.",
            next_command="qwen3ft status",
        )


def _run_id(version: Champion) -> str:
    return version.source_uri.removeprefix("runs:/").partition("/")[0]


def _not_as_saved(run_id: str, problem: str, digest: str) -> SaveError:
    return SaveError(
        f"The adapter of MLflow run {run_id} is refused: {problem}.",
        why=f"It is not what was saved (sha256 {digest[:16] or 'unknown'}): cut off or changed.",
        next_command="qwen3ft sync",
        run_id=run_id,
        sha256=digest,
    )


def _copy_content(source: Path, target: Path) -> None:
    shutil.copytree(source, target, dirs_exist_ok=True)
