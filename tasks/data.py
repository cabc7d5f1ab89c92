"""Stage 4: question-answer files in, tokenised rows on disk, every row accounted for."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from prefect import task

from qwen3ft.config import TrainingConfig
from qwen3ft.data.folder import read_manifest
from qwen3ft.data.pipeline import dataset_target, make_dataset
from qwen3ft.data.sources import resolved
from qwen3ft.jobs.folders import RunDir
from qwen3ft.logs import without_secrets
from qwen3ft.records.data import DatasetManifest, ResolvedSources
from qwen3ft.records.model import ModelSnapshot
from tasks.policies import cache_key


def _key(_: Any, parameters: dict[str, Any]) -> str:
    return cache_key("data", parameters["target"])  # names the content, and where it is kept


@task(
    name="data",
    task_run_name="data",
    cache_key_fn=_key,
    persist_result=True,
    result_serializer="json",
)
@without_secrets()
def tokenize(
    sources: ResolvedSources,
    model: ModelSnapshot,
    run: str,
    target: str,
    known_rows: str | None,
    made: DatasetManifest | None,
) -> DatasetManifest:
    """Read, check and tokenise, unless `made` says that it has been done."""
    return made or make_dataset(sources, model, RunDir(Path(run)), Path(target), known_rows)


def prepare_data(
    config: TrainingConfig, model: ModelSnapshot, run: RunDir, known_rows: str | None
) -> DatasetManifest:
    """Run the data stage: changed files give another folder; a damaged folder is made anew.

    Args:
        config: Paths, and what to do with their rows.
        model: Model whose tokenizer and template to use.
        run: Run whose folder receives the worker's files.
        known_rows: File of the rows seen before; matters only where new ones are to be mixed.
    """
    known_rows = known_rows if config.new_data == "mix" else None
    sources = resolved(config)
    target = dataset_target(sources, model, known_rows)
    made = read_manifest(target)
    return tokenize.with_options(refresh_cache=made is None)(
        sources, model, str(run.path), str(target), known_rows, made
    )
