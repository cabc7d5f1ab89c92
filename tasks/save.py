"""Stage 8: the best checkpoint's adapter, saved, read back and handed to MLflow."""

from __future__ import annotations

from pathlib import Path

from prefect import task
from prefect.cache_policies import NO_CACHE

from qwen3ft.config import TrainingConfig
from qwen3ft.jobs.folders import RunDir
from qwen3ft.logs import without_secrets
from qwen3ft.model.save_adapter import save_adapter
from qwen3ft.records.model import SavedAdapter
from qwen3ft.records.plan import TrainPlan
from qwen3ft.records.training import AttemptOutcome
from qwen3ft.tracking.journal import Journal
from tasks.names import name_of, save_name


@task(name="save", task_run_name=name_of(save_name), cache_policy=NO_CACHE)
@without_secrets()
def save(config: TrainingConfig, plan: TrainPlan, outcome: AttemptOutcome) -> SavedAdapter:
    """Write and verify the adapter folder, and journal its upload."""
    saved = save_adapter(outcome, plan, config)
    Journal(RunDir(Path(plan.run_dir))).artifacts(Path(saved.path), "adapter")
    return saved
