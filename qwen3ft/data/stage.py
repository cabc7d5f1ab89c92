"""The data stage: tokenised rows, made once and kept."""

from __future__ import annotations

from pathlib import Path

from qwen3ft.config import TrainingConfig
from qwen3ft.data.pipeline import read_manifest
from qwen3ft.jobs.folders import RunDir
from qwen3ft.jobs.launcher import run_worker
from qwen3ft.records.data import DatasetManifest
from qwen3ft.records.model import ModelSnapshot
from qwen3ft.records.requests import DataRequest


def tokenized_data(
    config: TrainingConfig,
    model: ModelSnapshot,
    run: RunDir,
    target: Path,
    known_rows: str | None = None,
) -> DatasetManifest:
    """The rows at `target`, read and tokenised if they are not there or do not verify."""
    if (manifest := read_manifest(target)) is not None:
        return manifest
    request = DataRequest(config=config, model=model, target=str(target), known_rows=known_rows)
    job = run.job("data").create(request)
    return run_worker("data", job, DatasetManifest, stall_seconds=config.stall_seconds)
