"""Stage 1: check that a run can start on this machine."""

from __future__ import annotations

from prefect import task
from prefect.cache_policies import NO_CACHE

from qwen3ft.logs import without_secrets
from qwen3ft.machine.environment import EnvironmentManager
from qwen3ft.records.machine import EnvironmentReport


@task(name="environment", task_run_name="environment", cache_policy=NO_CACHE)
@without_secrets()
def check_environment() -> EnvironmentReport:
    """Raise at once if something is missing; free memory and disk are measured, never cached."""
    manager = EnvironmentManager()
    manager.validate_environment()
    return manager.report()
