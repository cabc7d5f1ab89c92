"""Stage 3: the adapter, counted from the model's shape."""

from __future__ import annotations

from typing import Any

from prefect import task

from qwen3ft.config import TrainingConfig
from qwen3ft.logs import without_secrets
from qwen3ft.model.adapter import plan_adapter
from qwen3ft.records.model import AdapterSpec, ModelSnapshot
from tasks.policies import cache_key


def _key(_: Any, parameters: dict[str, Any]) -> str:
    config, model = parameters["config"], parameters["model"]
    dials = [config.lora_r, config.lora_alpha, config.lora_dropout]
    return cache_key("lora", dials, model.shape.model_dump())


@task(
    name="lora",
    task_run_name="lora",
    cache_key_fn=_key,
    persist_result=True,
    result_serializer="json",
)
@without_secrets()
def configure_lora(config: TrainingConfig, model: ModelSnapshot) -> AdapterSpec:
    """Choose the layers that get an adapter and count its parameters."""
    return plan_adapter(config, model.shape)
