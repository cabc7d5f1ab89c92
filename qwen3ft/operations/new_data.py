"""What a run's data brings that the champion's run had not seen."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from qwen3ft.data.known_rows import read_known_rows
from qwen3ft.data.row_questions import QUESTIONS_FILE, NewRows, find_new_rows
from qwen3ft.model.saved_adapter import KNOWN_ROWS_FILE, read_run_card
from qwen3ft.records.data import DataChange, DatasetManifest
from qwen3ft.records.evaluation import Champion


def find_known_rows(champion: Champion | None) -> str | None:
    """The file beside the champion's adapter; None where there is no such champion or file."""
    if champion is None or champion.adapter_path is None:
        return None
    path = Path(champion.adapter_path) / KNOWN_ROWS_FILE
    return str(path) if path.is_file() else None


def compare_data(dataset: DatasetManifest, champion: Champion | None) -> DataChange:
    """What is new, changed and gone since `champion` was trained; without one all rows are new."""
    known = find_known_rows(champion)
    if champion is None or champion.adapter_path is None or known is None:
        every = find_new_rows(Path(dataset.path) / QUESTIONS_FILE, np.empty(0, np.uint64))
        count = sum(every.counts.values()) or dataset.train.rows
        return DataChange(new_rows=count, **_told(dataset, every))
    before = read_run_card(Path(champion.adapter_path))["data"]
    old = {(source["role"], source["path"]): source["sha256"] for source in before["sources"]}
    now = {(source.role, source.path): source.sha256 for source in dataset.sources}
    rows = read_known_rows(Path(dataset.path) / KNOWN_ROWS_FILE)
    seen_before = read_known_rows(Path(known))
    seen = np.isin(rows, seen_before, assume_unique=True)
    new = find_new_rows(Path(dataset.path) / QUESTIONS_FILE, seen_before)
    return DataChange(
        since=f"{champion.registered_model} v{champion.version}",
        new_files=tuple(sorted(path for role, path in now.keys() - old.keys())),
        changed_files=tuple(
            sorted(key[1] for key in now.keys() & old.keys() if now[key] != old[key])
        ),
        gone_files=tuple(sorted(path for role, path in old.keys() - now.keys())),
        new_rows=int((~seen).sum()),
        unchanged=before["digest"] == dataset.digest,
        **_told(dataset, new),
    )


def _told(dataset: DatasetManifest, new: NewRows) -> dict[str, Any]:
    """New rows by file, and what a few of them ask."""
    names = [source.path for source in dataset.sources]
    return {
        "new_rows_by_file": {names[number]: count for number, count in new.counts.items()},
        "examples": new.examples,
    }
