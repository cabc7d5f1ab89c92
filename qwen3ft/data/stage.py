"""The data stage as a job of a worker."""

from __future__ import annotations

from pathlib import Path

from qwen3ft.jobs.folders import RunDir
from qwen3ft.jobs.launcher import run_worker
from qwen3ft.records.data import DatasetManifest, ResolvedSources
from qwen3ft.records.model import ModelSnapshot
from qwen3ft.records.requests import DataRequest


def make_dataset(
    sources: ResolvedSources,
    model: ModelSnapshot,
    run: RunDir,
    target: Path,
    known_rows: str | None = None,
) -> DatasetManifest:
    """Read and tokenise the rows into the folder `target`, in a worker.

    Raises:
        DataLoadingError, TokenizerError: as `DataPipeline.prepare`.
    """
    request = DataRequest(sources=sources, model=model, target=str(target), known_rows=known_rows)
    job = run.job("data").create(request)
    return run_worker("data", job, DatasetManifest, stall_seconds=sources.config.stall_seconds)
