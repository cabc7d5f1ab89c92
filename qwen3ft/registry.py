"""MLflow's model registry as the place where adapters are promoted: register, fetch, promote.

Guarantees: a version is only made of bytes that MLflow gave back with the right sha256, and a
champion is only handed out after the same check; the alias "champion" moves last, so that it always
names a complete version; every step may be repeated after a crash. No MLflow flavor is used, so
nothing is unpickled or executed.

MLflow has no compare-and-set. `promote` compares and sets under a lock of this machine; promoters
on two machines may both win in the milliseconds between the two, and the later one stays.
"""

from __future__ import annotations

import fcntl
import hashlib
import os
import re
import shutil
import tempfile
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TypeVar

from qwen3ft.errors import (
    ChampionChangedError,
    ConfigError,
    FinetuneError,
    NotInMlflowError,
    RejectedError,
    RequestError,
    SaveError,
    TrackingUnavailableError,
)
from qwen3ft.logs import mask_secrets
from qwen3ft.records import SavedAdapter
from qwen3ft.result_records import Champion
from qwen3ft.storage import build_folder, find_damage, read_manifest_facts, sha256_file
from qwen3ft.tracking import Connection, connect, load_client
from qwen3ft.tracking_uri import database_path

CHAMPION = "champion"
"""Alias of the version in use."""

PREVIOUS = "previous"
"""Alias of the version that was in use before it."""

ADAPTER_PATH = "adapter"
"""Where a run's adapter lies among its artifacts."""

DIGEST_TAG = "adapter_sha256"
"""Tag of a version: sha256 of its adapter_model.safetensors."""

_WEIGHTS = "adapter_model.safetensors"
_TRANSFER_SECONDS = 1800.0

ResultT = TypeVar("ResultT")


def registered_model_name(model_name: str) -> str:
    """A registry name for a model: its last two path parts, without what MLflow forbids."""
    parts = [part for part in re.split(r"[/\\:]+", model_name) if part not in ("", ".", "..")]
    return f"qwen3ft-{'--'.join(parts[-2:]) or 'model'}"


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
                `qwen3ft.cursor.wait_until_sent`.
        """
        name = _checked(saved.registered_model or registered_model_name(saved.model_name))
        with tempfile.TemporaryDirectory(prefix="qwen3ft-") as folder:
            self._fetch(run_id, saved.sha256, Path(folder))
        all_tags = {**tags, DIGEST_TAG: saved.sha256}
        return self._within(
            self.deadline_seconds, lambda connection: _register(connection, name, run_id, all_tags)
        )

    def champion(self, registered_model: str) -> Champion | None:
        """The version in use, or None if there is none yet."""
        name = _checked(registered_model)
        return self._within(
            self.deadline_seconds, lambda connection: _find_champion(connection, name)
        )

    def download(self, champion: Champion, target: Path) -> Path:
        """Fetch the champion's adapter into the folder `target`, all or nothing.

        A complete and undamaged `target` with the right bytes is kept as it is.

        Raises:
            SaveError: the version has no digest, or MLflow holds other bytes.
        """
        digest = champion.tags.get(DIGEST_TAG, "")
        weights = target / _WEIGHTS
        if weights.is_file() and find_damage(target) is None and sha256_file(weights) == digest:
            return target
        with tempfile.TemporaryDirectory(prefix="qwen3ft-") as folder:
            run_id = champion.source_uri.removeprefix("runs:/").partition("/")[0]
            fetched = self._fetch(run_id, digest, Path(folder))
            build_folder(
                target,
                lambda staging: _copy_content(fetched, staging),
                read_manifest_facts(fetched),
            )
        return target

    def promote(self, registered_model: str, version: str, expected: str | None) -> None:
        """Make `version` the champion if the champion still is `expected` (None: there is none).

        The old champion becomes "previous". Promoting the champion again changes nothing.

        Raises:
            ChampionChangedError: another version is the champion now.
        """
        name = _checked(registered_model)
        with _promotion_lock(self.tracking_uri):
            self._within(
                self.deadline_seconds,
                lambda connection: _promote(connection, name, version, expected),
            )

    def _fetch(self, run_id: str, digest: str, folder: Path) -> Path:
        """Download a run's adapter and compare its sha256 with `digest`."""
        self._within(self.deadline_seconds, lambda connection: connection.has_run(run_id))
        try:
            fetched = self._within(
                _TRANSFER_SECONDS,
                lambda connection: connection.download(run_id, ADAPTER_PATH, folder),
            )
            found = sha256_file(fetched / _WEIGHTS)
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


def _register(connection: Connection, name: str, run_id: str, tags: dict[str, str]) -> str:
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


def _find_champion(connection: Connection, name: str) -> Champion | None:
    try:
        with connection.calls() as client:
            number = client.get_registered_model(name).aliases.get(CHAMPION)
            if number is None:
                return None
            version = client.get_model_version(name, number)
    except NotInMlflowError:
        return None
    return Champion(
        registered_model=name,
        version=str(version.version),
        source_uri=str(version.source),
        tags={str(key): str(value) for key, value in version.tags.items()},
        adapter_path=None,
    )


def _promote(connection: Connection, name: str, version: str, expected: str | None) -> None:
    current = _find_champion(connection, name)
    found = current.version if current else None
    if found == version:
        return
    _require_version(connection, name, version)
    if found != expected:
        raise ChampionChangedError(
            f"{name} {version} is not promoted: the champion is {found}, not {expected}.",
            why="Another run promoted an adapter after this one was compared.",
            next_command="qwen3ft train",
            champion=found,
            expected=expected,
        )
    with connection.calls() as client:
        if found is not None:
            client.set_registered_model_alias(name, PREVIOUS, found)
        client.set_registered_model_alias(name, CHAMPION, version)


def _require_version(connection: Connection, name: str, version: str) -> None:
    try:
        with connection.calls() as client:
            client.get_model_version(name, version)
    except NotInMlflowError:
        raise RequestError(
            f"There is no version {version} of {name} to promote.",
            why="It was never registered, or was deleted.",
            next_command="qwen3ft status",
        ) from None


def _checked(name: str) -> str:
    if re.fullmatch(r"[^/:'\"\\]+", name):
        return name
    raise ConfigError(
        f"{name!r} cannot be the name of a registered model.",
        why="MLflow's registry takes no '/', ':' or quotes in a name.",
        next_command="qwen3ft plan --help",
    )


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


@contextmanager
def _promotion_lock(tracking_uri: str) -> Iterator[None]:
    database = database_path(tracking_uri)
    if database is not None and database.parent.is_dir():
        path = database.with_name(f"{database.name}.promote.lock")
    else:
        digest = hashlib.sha256(tracking_uri.encode()).hexdigest()[:16]
        path = Path(tempfile.gettempdir()) / f"qwen3ft-{os.getuid()}-{digest}.promote.lock"
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o600)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)
