"""Comparison of a run's data with that of the champion."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

import numpy as np

from qwen3ft.config import TrainingConfig, parse_config
from qwen3ft.data.known_rows import read_known_rows
from qwen3ft.data.splits import Hashes, Mask
from qwen3ft.data.token_table import read_origins
from qwen3ft.errors import ConfigError
from qwen3ft.logs import mask_values
from qwen3ft.model.saved_adapter import KNOWN_ROWS_FILE, read_provenance
from qwen3ft.operations.night import SETTINGS_THAT_DO_NOT_DECIDE
from qwen3ft.records.data import DataChange, DatasetManifest
from qwen3ft.records.evaluation import Champion

_EXAMPLES = 5


def find_known_rows(champion: Champion | None) -> str | None:
    """Return the file of known rows beside the champion's adapter, if there is one."""
    if champion is None or champion.adapter_path is None:
        return None
    path = Path(champion.adapter_path) / KNOWN_ROWS_FILE
    return str(path) if path.is_file() else None


def compare_data(dataset: DatasetManifest, champion: Champion | None) -> DataChange:
    """Find what is new, changed and gone since `champion`; without one all rows are new."""
    known_path = find_known_rows(champion)
    rows = read_known_rows(Path(dataset.path) / KNOWN_ROWS_FILE)
    known = read_known_rows(Path(known_path)) if known_path else np.empty(0, np.uint64)
    is_new = ~np.isin(rows, known)
    change = DataChange(
        new_rows=int(is_new.sum()),
        new_rows_by_file=_by_file(dataset, is_new),
        examples=_examples(dataset, known),
    )
    if champion is None or champion.adapter_path is None or known_path is None:
        return change
    before = read_provenance(Path(champion.adapter_path))["data"]
    old = {(source["role"], source["path"]): source["sha256"] for source in before["sources"]}
    now = {(source.role, source.path): source.sha256 for source in dataset.sources}
    changed = {key for key in now.keys() & old.keys() if now[key] != old[key]}
    return change.model_copy(
        update={
            "since": f"{champion.registered_model} v{champion.version}",
            "new_files": _paths(now.keys() - old.keys()),
            "changed_files": _paths(changed),
            "gone_files": _paths(old.keys() - now.keys()),
            "unchanged": before["digest"] == dataset.digest,
        }
    )


def explain_training(
    change: DataChange, champion: Champion | None, config: TrainingConfig
) -> DataChange:
    """Add the data paths of the champion and, if nothing is new, the reason to train all the same.

    Args:
        change: Result of `compare_data` for the same champion.
        champion: The adapter in use, fetched.
        config: Settings of the run.
    """
    if champion is None or champion.adapter_path is None or change.since is None:
        return change
    try:
        theirs = parse_config(read_provenance(Path(champion.adapter_path))["config"])
    except (ConfigError, KeyError, ValueError):
        return change  # it was made by another version, or by hand
    again = "" if change.new_rows else _why_again(change, theirs, config)
    return change.model_copy(update={"champion_paths": theirs.data_paths, "again": again})


def _why_again(change: DataChange, theirs: TrainingConfig, config: TrainingConfig) -> str:
    # An adapter's settings are masked where it was saved.
    before, now = (mask_values(one.model_dump(mode="json")) for one in (theirs, config))
    decisive = [name for name in now if name not in SETTINGS_THAT_DO_NOT_DECIDE | {"name"}]
    changed = [name for name in decisive if before[name] != now[name]]
    parts = [f"{name} {before[name]} -> {now[name]}" for name in changed]
    if theirs.effective_batch_size != config.effective_batch_size:
        parts.append(f"batch size {theirs.effective_batch_size} -> {config.effective_batch_size}")
    if parts:
        return f"with other settings than the champion's, {', '.join(parts)}"
    if not change.unchanged:
        return "with rows gone, another template or another model"
    return "as when_unchanged is train" if config.when_unchanged == "train" else ""


def _paths(files: Iterable[tuple[str, str]]) -> tuple[str, ...]:
    return tuple(sorted(path for _, path in files))


def _by_file(dataset: DatasetManifest, is_new: Mask) -> dict[str, int]:
    """Return the number of new rows of each file that has some; rows stand file by file."""
    ends = np.cumsum([source.for_training for source in dataset.sources])
    if ends[-1:] != len(is_new):
        return {}  # a folder of an earlier version
    parts = zip(dataset.sources, np.split(is_new, ends[:-1]), strict=True)
    return {source.path: int(part.sum()) for source, part in parts if part.any()}


def _examples(dataset: DatasetManifest, known: Hashes) -> tuple[str, ...]:
    """Return the questions of a few rows trained on that are not known.

    The same rows give the same examples, in whatever order they were read: of each file in turn the
    one with the smallest hash.
    """
    origins = read_origins(Path(dataset.path))
    if origins is None:
        return ()
    hashes, sources = (origins.column(name).to_numpy() for name in ("hash", "source"))
    new = np.flatnonzero(~np.isin(hashes, known))
    new = new[np.lexsort((hashes[new], sources[new]))]
    ranks = np.arange(len(new)) - np.searchsorted(sources[new], sources[new])  # within a file
    chosen = new[np.argsort(ranks, kind="stable")[:_EXAMPLES]]
    questions = origins.column("question")
    return tuple(questions[position].as_py() for position in chosen.tolist())
