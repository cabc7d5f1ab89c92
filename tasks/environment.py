"""Stage 1: check that a run can start on this machine."""

from __future__ import annotations

from pathlib import Path

from prefect import task
from prefect.cache_policies import NO_CACHE

from qwen3ft.config import TrainingConfig
from qwen3ft.jobs.folders import RunDir
from qwen3ft.logs import without_secrets
from qwen3ft.machine.environment import EnvironmentManager
from qwen3ft.model.room import require_room
from qwen3ft.records.machine import EnvironmentReport
from qwen3ft.tracking.uri import database_path, default_tracking_uri


@task(name="environment", task_run_name="environment", cache_policy=NO_CACHE)
@without_secrets()
def check_environment(config: TrainingConfig, run: str) -> EnvironmentReport:
    """Raise at once if something is missing; free memory and disk are measured, never cached."""
    manager = EnvironmentManager()
    manager.validate_environment()
    database = database_path(default_tracking_uri())
    require_room(config, RunDir(Path(run)), database.parent if database else None)
    return manager.report()
