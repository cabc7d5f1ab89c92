"""Stage 6: run the plan's worst batches and measure their memory before training."""

from __future__ import annotations

from prefect import task
from prefect.cache_policies import NO_CACHE

from qwen3ft.config import TrainingConfig
from qwen3ft.jobs.folders import RunDir
from qwen3ft.logs import without_secrets
from qwen3ft.preflight.report import preflight_markdown
from qwen3ft.preflight.stage import measure_first
from qwen3ft.records.machine import EnvironmentReport
from qwen3ft.records.plan import TrainPlan
from qwen3ft.records.preflight import PreflightReport
from qwen3ft.tracking.journal import Journal
from qwen3ft.tracking.run_metrics import preflight_metrics
from tasks.artifacts import PREFLIGHT, show_markdown


@task(name="preflight", task_run_name="preflight", cache_policy=NO_CACHE)
@without_secrets()
def run_preflight(
    config: TrainingConfig, environment: EnvironmentReport, plan: TrainPlan, run: RunDir
) -> TrainPlan:
    """Return the plan to train with; measurements go to the run's page and to MLflow."""
    # The preflight's own cache serves runs without a Prefect server too, unlike Prefect's.
    result = measure_first(config, environment, plan, run)
    if result.reports:
        _show(run, result.reports)
    return result.plan


def _show(run: RunDir, reports: tuple[PreflightReport, ...]) -> None:
    markdown = preflight_markdown(reports)
    show_markdown(PREFLIGHT, markdown, "Memory predicted, and measured")
    journal = Journal(run)
    journal.json("preflight.json", [report.model_dump(mode="json") for report in reports])
    journal.text("preflight.md", markdown)
    journal.metrics(preflight_metrics(reports[-1]))
