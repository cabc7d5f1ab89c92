"""Decides what may be removed to free disk space, with reasons, and removes it.

Never removed: runs whose adapter an alias points at, running ones, those that can be continued or
that MLflow lacks something of; the quantised models and tokenised rows that any of these depend on;
saved adapters. While a run is in progress nothing that runs share is touched.
"""

from __future__ import annotations

import os
import shutil
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import nullcontext, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from pydantic import Field

from qwen3ft.config import TrainingConfig
from qwen3ft.disk.locks import try_lock
from qwen3ft.disk.manifests import is_left_behind
from qwen3ft.errors import RequestError
from qwen3ft.jobs.folders import JobDir
from qwen3ft.logs import get_logger
from qwen3ft.model.saved_adapter import has_provenance, read_provenance
from qwen3ft.operations.run_state import RunState, find_runs
from qwen3ft.records.base import Record
from qwen3ft.registry.versions import ProtectedVersion
from qwen3ft.text.names import flaw_of_name

logger = get_logger("retention")

Kind = Literal[
    "run", "checkpoints", "quantised model", "tokenised rows", "champion copy", "leftover"
]

DAY_SECONDS = 86400.0
LEFTOVER_DAYS = 1.0
"""Age at which an unfinished write counts as killed."""

_GONE = ".gone"
_SHARED: dict[Kind, str] = {"quantised model": "models", "tokenised rows": "datasets"}


class RetentionPolicy(Record):
    """Age limits, in days, and exceptions to them."""

    keep_days: float = Field(30.0, ge=0, description="Runs, and folders that no younger run used.")
    keep_runs: int = Field(20, ge=0, description="Newest runs to keep, whatever their age.")
    checkpoint_days: float = Field(7.0, ge=0, description="Checkpoints of completed runs.")
    abandon: tuple[str, ...] = Field((), description="Failed runs that need not be continued.")


class Removal(Record):
    """One folder to be removed."""

    path: str
    kind: Kind
    size_bytes: int
    why: str
    lock: str | None = Field(None, description="Lock of the run, held while its files are removed.")


@dataclass(frozen=True)
class Stock:
    """Runs, versions and folders to decide about."""

    runs: list[RunState]
    """All runs, the newest first."""
    protected: Sequence[ProtectedVersion]
    """Versions in use."""
    used: frozenset[Path] | None
    """Shared folders that are still needed; None if unknown, so that all are kept."""


def plan_removals(
    config: TrainingConfig, protected: Sequence[ProtectedVersion], policy: RetentionPolicy
) -> list[Removal]:
    """Return what the policy removes, and why, without removing anything.

    Args:
        config: Names the folders of runs, caches and adapters.
        protected: Versions in use, from `registry.versions.find_protected`.
        policy: Age limits.

    Raises:
        RequestError: a run to be abandoned is not one that could be continued.
    """
    cache = Path(config.cache_dir).resolve()
    runs = find_runs(Path(config.runs_dir).resolve())
    _require_continuable(policy.abandon, runs)
    stock = Stock(runs, protected, _used(runs, protected, policy, cache, config))
    removals = [*_runs(stock, policy), *_checkpoints(stock, policy)]
    if not any(state.state == "running" for state in runs):
        removals += [*_shared(stock, policy, cache), *_copies(stock, cache)]
        removals += _leftovers(cache, config)
    return removals


def remove(removals: Iterable[Removal]) -> list[Removal]:
    """Remove what was planned; what is in use or cannot be removed is logged and stays.

    Returns:
        The removals that were made.
    """
    gone = []
    for removal in removals:
        try:
            with (
                nullcontext(True) if removal.lock is None else try_lock(Path(removal.lock)) as mine
            ):
                if mine:
                    _remove(removal)
                    gone.append(removal)
                else:
                    logger.warning("%s stays: its run is in progress", removal.path)
        except OSError as error:
            logger.warning("%s stays: %s", removal.path, error)
    return gone


# --- what may be removed ---


def _runs(stock: Stock, policy: RetentionPolicy) -> Iterator[Removal]:
    in_use = {version.run_id for version in stock.protected}
    for rank, state in enumerate(stock.runs):
        name = state.run.path.name
        abandoned = name in policy.abandon and state.state == "continuable"
        old = rank >= policy.keep_runs and state.age_seconds > policy.keep_days * DAY_SECONDS
        if name in in_use or not (abandoned or (old and state.state in ("completed", "ended"))):
            continue
        why = "abandoned" if abandoned else f"{state.state}, {_days(state.age_seconds)} old"
        yield _removal(state.run.path, "run", why, state.run.lock)


def _checkpoints(stock: Stock, policy: RetentionPolicy) -> Iterator[Removal]:
    in_use = {version.run_id for version in stock.protected}
    going = {removal.path for removal in _runs(stock, policy)}
    for state in stock.runs:
        old = state.age_seconds > policy.checkpoint_days * DAY_SECONDS
        kept = state.run.path.name in in_use or str(state.run.path) in going
        if kept or not old or state.state != "completed":
            continue
        for job in state.run.attempts():
            if job.checkpoints.is_dir():
                why = f"its run completed {_days(state.age_seconds)} ago"
                yield _removal(job.checkpoints, "checkpoints", why, state.run.lock)


def _shared(stock: Stock, policy: RetentionPolicy, cache: Path) -> Iterator[Removal]:
    if stock.used is None:
        return
    for kind, folder in _SHARED.items():
        for path in _folders(cache / folder):
            age_seconds = time.time() - path.stat().st_mtime
            if path.resolve() in stock.used or age_seconds <= policy.keep_days * DAY_SECONDS:
                continue
            yield _removal(path, kind, f"no run of the last {policy.keep_days:g} days used it")


def _copies(stock: Stock, cache: Path) -> Iterator[Removal]:
    in_use = {(version.registered_model, version.version) for version in stock.protected}
    for model in _folders(cache / "champions"):
        for path in _folders(model):
            if (model.name, path.name) not in in_use and has_provenance(path):
                yield _removal(path, "champion copy", "no longer in use; MLflow has it")


def _leftovers(cache: Path, config: TrainingConfig) -> Iterator[Removal]:
    """Yield leftovers of killed writes and removals, known by their names."""
    parents = [cache / folder for folder in _SHARED.values()]
    parents += [*_folders(cache / "champions"), Path(config.output_dir).resolve()]
    found = [path for parent in parents for path in parent.glob(".*") if is_left_behind(path)]
    runs = Path(config.runs_dir).resolve()
    gone = [*runs.glob(f".*{_GONE}"), *runs.glob(f"*/attempts/*/.*{_GONE}")]
    jobs = [cache / "sessions", cache / "export"]
    parents += jobs
    for path in sorted({*found, *gone, *(p for each in parents for p in each.glob(f".*{_GONE}"))}):
        if path.is_dir() and time.time() - path.stat().st_mtime > LEFTOVER_DAYS * DAY_SECONDS:
            yield _removal(path, "leftover", "a write or removal that was killed")
    for path in (path for parent in jobs for path in _folders(parent)):
        beats = [each.stat().st_mtime for each in (path, JobDir(path).heartbeat) if each.exists()]
        if time.time() - max(beats, default=0) > LEFTOVER_DAYS * DAY_SECONDS:
            yield _removal(path, "leftover", "files of a chat, export or server that was killed")


# --- what is in use ---


def _used(
    runs: list[RunState],
    protected: Sequence[ProtectedVersion],
    policy: RetentionPolicy,
    cache: Path,
    config: TrainingConfig,
) -> frozenset[Path] | None:
    """Return the shared folders to keep; None if the base of a version in use is unknown."""
    used = {
        path
        for state in runs
        if state.state in ("running", "continuable", "unsent")
        or state.age_seconds <= policy.keep_days * DAY_SECONDS
        for path in state.uses
    }
    by_run = {state.run.path.name: state.uses for state in runs}
    for version in protected:
        needed = by_run.get(version.run_id or "") or _base_of(version, cache, config)
        if not needed:
            logger.warning("no base model is removed: that of %s is unknown", version.describe())
            return None
        used |= needed
    return frozenset(used)


def _base_of(
    version: ProtectedVersion, cache: Path, config: TrainingConfig
) -> frozenset[Path] | None:
    """Return the quantised model named by a local copy of a version's adapter."""
    if any(map(flaw_of_name, filter(None, (version.registered_model, version.run_id)))):
        return None  # another program's model, in a registry that is shared with it
    copies = [cache / "champions" / version.registered_model / version.version]
    outputs = (config.output_dir, *config.fallback_output_dirs)
    copies += [Path(folder) / (version.run_id or "") for folder in outputs]
    for copy in copies:
        if has_provenance(copy):
            with suppress(ValueError, KeyError, TypeError):  # not written by a run
                return frozenset([Path(read_provenance(copy)["base"]["snapshot_path"]).resolve()])
    return None


# --- helpers ---


def _require_continuable(wanted: Sequence[str], runs: list[RunState]) -> None:
    states = {state.run.path.name: state.state for state in runs}
    for name in wanted:
        if (state := states.get(name)) != "continuable":
            raise RequestError(
                f"Run {name} cannot be abandoned: "
                + ("there is no such run." if state is None else f"it is {state}."),
                why="Only failed runs that could be continued can be. Nothing was removed.",
                next_command="qwen3ft clean --dry-run",
                run_id=name,
            )


def _removal(path: Path, kind: Kind, why: str, lock: Path | None = None) -> Removal:
    files = (file for file in path.rglob("*") if file.is_file() and not file.is_symlink())
    size_bytes = sum(file.stat().st_size for file in files)
    return Removal(
        path=str(path), kind=kind, size_bytes=size_bytes, why=why, lock=str(lock) if lock else None
    )


def _remove(removal: Removal) -> None:
    path = Path(removal.path)
    # renamed first, so that whoever looks meanwhile finds all of it or nothing
    gone = path.with_name(f".{path.name}{_GONE}")
    os.rename(path, gone)
    shutil.rmtree(gone)


def _folders(parent: Path) -> list[Path]:
    if not parent.is_dir():
        return []
    return [path for path in sorted(parent.iterdir()) if path.is_dir() and path.name[0] != "."]


def _days(seconds: float) -> str:
    return f"{seconds / DAY_SECONDS:.0f} days"
