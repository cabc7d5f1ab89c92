"""One scheduled night: its request, and whether a run finished, is running or abandoned it.

    <runs_dir>/.nights/2026-11-26-1a2b3c4d5e6f.json    its result: `NightRecord`
                                           ....lock    held by the process that runs it

The key is the date and a digest of what decides the result: data files, settings and the model's
revision. So a night that is started twice runs once, and a request for other data is another night.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Literal

from pydantic import Field, ValidationError

from qwen3ft.config import TrainingConfig, registered_model_name
from qwen3ft.data.sources import resolved
from qwen3ft.disk.files import sha256_file, sha256_json
from qwen3ft.disk.locks import try_lock
from qwen3ft.jobs.folders import RunDir, read_record, write_record
from qwen3ft.model.hub import resolve_model
from qwen3ft.records.base import Record
from qwen3ft.settings import CHANGEABLE_SETTINGS

REQUEST_TAG = "request_sha256"
"""Version tag: digest of the request that the version answers."""

SETTINGS_TAG = "settings_sha256"
"""Version tag: digest of the part of its request that is not data."""

DEFERRED = "deferred"
"""Decision of a run that could not reach the registry; its night is not over."""

SETTINGS_THAT_DO_NOT_DECIDE = frozenset(
    [
        *CHANGEABLE_SETTINGS,
        # covered by the digests of files and of the model
        *("model_name", "model_revision", "data_paths", "dev_paths", "test_paths"),
        # only their product counts, and it is added
        *("batch_size", "gradient_accumulation_steps"),
    ]
)
"""Every other setting counts: a new one may cause a needless training, never a missing one."""


class NightRequest(Record):
    """Digests of everything that decides the result of a run."""

    sha256: str = Field(description="Digest of data, settings and model.")
    settings_sha256: str = Field(description="Digest of settings and model.")
    files: int = Field(description="Number of data files covered.")


class NightRecord(Record):
    """Result of a night."""

    date: str = Field(
        pattern=r"^\d{4}-\d\d-\d\d$", description="YYYY-MM-DD in the schedule's time zone."
    )
    request_sha256: str
    run_id: str
    state: Literal["running", "done", "failed"]
    """'running' with a free lock: the process was killed."""
    decision: str = ""
    """promoted, kept or nothing new once done; deferred; else empty."""
    champion: str | None = Field(None, description="Version that the candidate was compared with.")
    updated: datetime = Field(default_factory=lambda: datetime.now(UTC))


class Night:
    """One night's claim.

    Attributes:
        run_id: Run that has finished it, is running it, or will run it now.
        taken: Reason why this process has nothing to do; None if the night is its own.
        again: True if an earlier start of the night was left unfinished.
    """

    def __init__(self, run_id: str, taken: str | None = None, *, again: bool = False) -> None:
        self.run_id = run_id
        self.taken = taken
        self.again = again
        self.decision: str | None = None
        self.champion: str | None = None

    def settle(self, decision: str, champion: str | None = None) -> None:
        """Record how it ended; unless deferred, it counts as done."""
        self.decision, self.champion = decision, champion

    @property
    def is_done(self) -> bool:
        """True if another start has nothing left to do."""
        return self.decision not in (None, DEFERRED)


def describe_request(config: TrainingConfig) -> NightRequest:
    """Return the digests of everything that decides the result of a run.

    Raises:
        DataLoadingError, DownloadError: as `sources.resolved`.
        RequestError, ConfigError, DownloadError: as `hub.resolve_model`.
    """
    model = resolve_model(config)
    files = resolved(config).fingerprints
    settings = config.model_dump(mode="json", exclude={*SETTINGS_THAT_DO_NOT_DECIDE, "name"})
    # Under the setting's former name, so that requests of earlier versions are still known.
    usual = config.registered_name == registered_model_name(config.model_name)
    settings["registered_model"] = None if usual else config.registered_name
    ability = Path(config.ability_path) if config.ability_path else None
    decided = {
        "model": [model.model_name, model.revision],
        "ability": sha256_file(ability) if ability and ability.is_file() else "",
        "settings": settings | {"effective_batch_size": config.effective_batch_size},
    }
    return NightRequest(
        sha256=sha256_json({"files": files, **decided}),
        settings_sha256=sha256_json(decided),
        files=len(files),
    )


def write_request(run: RunDir, request: NightRequest) -> None:
    """Store the request in the run's folder, for the registry's tag."""
    write_record(run.path / "request.json", request)


def read_request(run: RunDir) -> NightRequest | None:
    """Return the request in a run's folder; None if it was not known."""
    path = run.path / "request.json"
    return read_record(path, NightRequest) if path.exists() else None


def request_tags(run: RunDir) -> dict[str, str]:
    """Return the request's tags for a registered version of this run."""
    request = read_request(run)
    if request is None:
        return {}
    return {REQUEST_TAG: request.sha256, SETTINGS_TAG: request.settings_sha256}


def is_answered_by(tags: Mapping[str, str], request: NightRequest) -> bool:
    """Return True if a version with these tags answers `request`."""
    return tags.get(REQUEST_TAG) == request.sha256


def same_settings(tags: Mapping[str, str], request: NightRequest | None) -> bool:
    """Return True if a version was made with the settings of `request`, as far as is known."""
    return request is None or tags.get(SETTINGS_TAG) in (None, request.settings_sha256)


@contextmanager
def claim_night(runs_dir: Path, date: str, request: NightRequest, run_id: str) -> Iterator[Night]:
    """Claim the night of `date`, unless it is done or in progress in another process.

    A night whose run failed or was killed is resumed under that run's id. So is an earlier night
    with the same request that was deferred: it is trained and only lacks a verdict.

    Args:
        runs_dir: Folder with the records, below `.nights`.
        date: YYYY-MM-DD.
        request: Digests of data, settings and model.
        run_id: Run to do it if none has begun.
    """
    path = _record_path(nights_folder(runs_dir), date, request)
    path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
    with try_lock(path.with_suffix(".lock")) as mine:
        earlier = _read(path)
        if not mine:
            yield Night(earlier.run_id if earlier else "", _in_progress(earlier))
        elif earlier is not None and earlier.state == "done":
            yield Night(earlier.run_id, f"already done by run {earlier.run_id}")
        else:
            deferred = _deferred(path.parent, request)
            undone = earlier or next(iter(deferred), None)
            night = Night(undone.run_id if undone else run_id, again=undone is not None)
            with _recorded(path, date, request, night):
                yield night
            for record in deferred if night.is_done else ():
                _write(_record_path(path.parent, record.date, request), record, night)


def kept_before(runs_dir: Path, request: NightRequest, champion: str | None) -> NightRecord | None:
    """Find the night whose candidate, for the same request, lost against this champion.

    Args:
        runs_dir: Folder with the records, below `.nights`.
        request: Digests of data, settings and model.
        champion: Version of the champion; None: there was none and is none.
    """
    for path in sorted(nights_folder(runs_dir).glob("*.json"), reverse=True):
        record = _read(path)
        if record is None or record.request_sha256 != request.sha256:
            continue
        if (record.state, record.decision, record.champion) == ("done", "kept", champion):
            return record
    return None


def date_of_run(runs_dir: Path, run_id: str) -> str | None:
    """Return the night that a run was started for, if any.

    A run that is resumed after midnight still does the night that it crashed in.
    """
    records = (_read(path) for path in sorted(nights_folder(runs_dir).glob("*.json"), reverse=True))
    return next((r.date for r in records if r is not None and r.run_id == run_id), None)


def nights_folder(runs_dir: Path) -> Path:
    """Return the folder with the records of nights."""
    return runs_dir.resolve() / ".nights"


@contextmanager
def _recorded(path: Path, date: str, request: NightRequest, night: Night) -> Iterator[None]:
    record = NightRecord(
        date=date, request_sha256=request.sha256, run_id=night.run_id, state="running"
    )
    write_record(path, record)
    try:
        yield
    finally:
        _write(path, record, night)


def _write(path: Path, record: NightRecord, night: Night) -> None:
    result = {
        "state": "done" if night.is_done else "failed",
        "decision": night.decision or "",
        "champion": night.champion,
        "updated": datetime.now(UTC),
    }
    write_record(path, record.model_copy(update=result))


def _record_path(folder: Path, date: str, request: NightRequest) -> Path:
    return folder / f"{date}-{request.sha256[:12]}.json"


def _deferred(folder: Path, request: NightRequest) -> list[NightRecord]:
    """Return the deferred nights with the same request, the newest first."""
    paths = sorted(folder.glob(f"*-{request.sha256[:12]}.json"), reverse=True)
    records = filter(None, map(_read, paths))
    return [record for record in records if record.decision == DEFERRED]


def _in_progress(record: NightRecord | None) -> str:
    return f"in progress as run {record.run_id}" if record else "in progress in another process"


def _read(path: Path) -> NightRecord | None:
    try:
        return read_record(path, NightRecord)
    except (OSError, ValueError, ValidationError):
        return None
