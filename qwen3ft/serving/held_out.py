"""The held-out rows of the run that made an adapter, where they still are on this machine."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from qwen3ft.config import TrainingConfig
from qwen3ft.errors import DataLoadingError
from qwen3ft.files import find_damage, read_manifest_facts
from qwen3ft.jobs.folders import RunDir
from qwen3ft.model.saved_adapter import read_run_card

ROWS_FILE = "test.jsonl"


def find_held_out(config: TrainingConfig, adapter: Path) -> Path:
    """The file of the rows that no training of this adapter showed.

    That is the one its inference test read; without it, the one among the cached data sets that has
    the digest of the adapter's run card.

    Raises:
        DataLoadingError: neither is here.
    """
    card = read_run_card(adapter)
    digest = card["data"]["digest"]
    for folder in (*_folder_tested(config, card), *_cached_folders(config)):
        facts = read_manifest_facts(folder)
        if facts.get("digest") == digest and find_damage(folder) is None:
            return folder / ROWS_FILE
    raise DataLoadingError(
        f"The held-out rows of run {card['run_id']} are not on this machine any more.",
        why=f"No data set with digest {digest[:16]} is in {Path(config.cache_dir) / 'datasets'}.",
        next_command=f"qwen3ft export --adapter {adapter} --rows FILE.jsonl",
        digest=digest,
    )


def _folder_tested(config: TrainingConfig, card: dict[str, Any]) -> list[Path]:
    request = RunDir(Path(config.runs_dir) / card["run_id"]).job("inference").request
    if not request.is_file():
        return []
    return [Path(json.loads(request.read_text(encoding="utf-8"))["questions_path"]).parent]


def _cached_folders(config: TrainingConfig) -> list[Path]:
    return sorted((Path(config.cache_dir) / "datasets").glob("*"))
