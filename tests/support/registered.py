"""A registry with versions in it, in real MLflow databases, for tests of promotions."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from support.small_adapter import write_small_adapter

from qwen3ft.jobs.folders import RunDir
from qwen3ft.records.model import SavedAdapter
from qwen3ft.registry.registry import Registry
from qwen3ft.tracking.cursor import parent_run_id
from qwen3ft.tracking.journal import Journal
from qwen3ft.tracking.sender import Sender

MODEL = "qwen3ft-embedded"


def copy_database(template: Path, folder: Path) -> str:
    """Copy a database to `folder`/mlruns; return its tracking URI."""
    (folder / "mlruns").mkdir(parents=True)
    return f"sqlite:///{shutil.copy(template, folder / 'mlruns' / 'mlflow.db')}"


def add_version(
    uri: str,
    folder: Path,
    run: str,
    degraded: tuple[str, ...] = (),
    settings: Mapping[str, Any] | None = None,
) -> str:
    """Register what run `run` with these settings saved, as the flow does; return the version."""
    adapter = RunDir(folder / "runs" / run).path / "adapter"
    saved = write_small_adapter(adapter, run, degraded)
    return register_saved(uri, folder, run, saved, settings)


def register_saved(
    uri: str,
    folder: Path,
    run: str,
    saved: SavedAdapter,
    settings: Mapping[str, Any] | None = None,
) -> str:
    """Register a saved adapter as that of run `run`; return the version."""
    run_dir = RunDir(folder / "runs" / run)
    journal = Journal(run_dir)
    journal.run_started(run, settings or {}, {})
    journal.artifacts(Path(saved.path), "adapter")
    Sender(run_dir, uri).send_all()
    named = saved.model_copy(update={"registered_model": MODEL})
    return Registry(uri).register(str(parent_run_id(run_dir)), named, {"run": run})


def stored_adapter(folder: Path, run: str) -> Path:
    """Return the folder in which MLflow keeps the adapter of `run`."""
    run_id = parent_run_id(RunDir(folder / "runs" / run))
    return folder / "mlruns" / "artifacts" / str(run_id) / "artifacts" / "adapter"
