"""Stage 4: question-answer files in, tokenised rows on disk, every row accounted for."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from prefect import task

from qwen3ft.config import TrainingConfig
from qwen3ft.data.pipeline import dataset_target, fingerprint_sources, read_manifest
from qwen3ft.data.sources import pin_sources
from qwen3ft.data.stage import tokenized_data
from qwen3ft.jobs.folders import RunDir
from qwen3ft.records.data import DatasetManifest
from qwen3ft.records.model import ModelSnapshot
from tasks.policies import cache_key


def _key(_: Any, parameters: dict[str, Any]) -> str:
    return cache_key("data", parameters["target"])  # names the content, and says where it is kept


@task(
    name="data",
    task_run_name="data",
    cache_key_fn=_key,
    persist_result=True,
    result_serializer="json",
)
def tokenize(
    config: TrainingConfig, model: ModelSnapshot, run: str, target: str, known_rows: str | None
) -> DatasetManifest:
    """Read, check and tokenise, unless the folder is already there and verifies."""
    return tokenized_data(config, model, RunDir(Path(run)), Path(target), known_rows)


def prepare_data(
    config: TrainingConfig, model: ModelSnapshot, run: RunDir, known_rows: str | None
) -> DatasetManifest:
    """The data stage: changed files give another key; a damaged folder is made anew.

    Args:
        config: With the paths and what to do with them.
        model: Whose tokenizer and template to use.
        run: Its folder receives the worker's files.
        known_rows: File of the rows seen before; matters only where new ones are to be mixed.
    """
    known_rows = known_rows if config.new_data == "mix" else None
    sources = fingerprint_sources(config)
    if (pinned := pin_sources(config)) != config:
        config, sources = pinned, fingerprint_sources(pinned)
    target = dataset_target(config, model, sources, known_rows)
    gone = read_manifest(target) is None
    return tokenize.with_options(refresh_cache=gone)(
        config, model, str(run.path), str(target), known_rows
    )
