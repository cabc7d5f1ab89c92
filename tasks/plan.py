"""Stage 5: derive every setting of the first attempt, with reasons and predicted memory."""

from __future__ import annotations

from typing import Any

from prefect import task

from qwen3ft.config import TrainingConfig
from qwen3ft.logs import without_secrets
from qwen3ft.planning.plan import build_plan
from qwen3ft.records.data import DatasetManifest
from qwen3ft.records.machine import EnvironmentReport
from qwen3ft.records.model import AdapterSpec, ModelSnapshot
from qwen3ft.records.plan import TrainPlan
from tasks.policies import cache_key


def _key(_: Any, parameters: dict[str, Any]) -> str:
    environment = parameters["environment"]
    machine = [[gpu.name, gpu.total_bytes, gpu.compute_capability] for gpu in environment.gpus]
    return cache_key(
        "plan",
        parameters["config"].model_dump(mode="json"),
        [machine, environment.host_total_bytes, environment.versions],
        *(parameters[name].model_dump(mode="json") for name in ("model", "adapter", "dataset")),
    )


@task(
    name="plan",
    task_run_name="plan",
    cache_key_fn=_key,
    persist_result=True,
    result_serializer="json",
)
@without_secrets()
def plan_training(
    config: TrainingConfig,
    environment: EnvironmentReport,
    model: ModelSnapshot,
    adapter: AdapterSpec,
    dataset: DatasetManifest,
) -> TrainPlan:
    """Return the first attempt's plan, not yet tied to a run."""
    return build_plan(config, environment, model, adapter, dataset)
