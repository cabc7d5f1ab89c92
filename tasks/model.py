"""Stage 2: the base model, pinned, quantised once and kept on disk."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from prefect import task

from qwen3ft.config import TrainingConfig
from qwen3ft.jobs.folders import RunDir
from qwen3ft.logs import without_secrets
from qwen3ft.model.hub import resolve_model
from qwen3ft.model.manager import read_snapshot, snapshot_target
from qwen3ft.model.stage import quantized_model
from qwen3ft.records.machine import EnvironmentReport
from qwen3ft.records.model import ModelSnapshot, ModelSource
from tasks.policies import RETRY_DELAYS_SECONDS, cache_key, is_transient


@task(
    name="resolve-model",
    task_run_name="resolve-model",
    retries=len(RETRY_DELAYS_SECONDS),
    retry_delay_seconds=RETRY_DELAYS_SECONDS,
    retry_condition_fn=is_transient,
    persist_result=False,
)
@without_secrets()
def resolve(config: TrainingConfig) -> ModelSource:
    """Resolve the name to a commit or to a folder's content; quick, and never cached."""
    return resolve_model(config)


def _key(_: Any, parameters: dict[str, Any]) -> str:
    return cache_key("model", parameters["target"])  # names the content, and says where it is kept


@task(
    name="model",
    task_run_name="model",
    cache_key_fn=_key,
    persist_result=True,
    result_serializer="json",
    retries=len(RETRY_DELAYS_SECONDS),
    retry_delay_seconds=RETRY_DELAYS_SECONDS,
    retry_condition_fn=is_transient,
)
@without_secrets()
def quantize(
    config: TrainingConfig, source: ModelSource, device: str, run: str, target: str
) -> ModelSnapshot:
    """Fetch and quantise, unless the folder exists and verifies."""
    return quantized_model(config, source, device, RunDir(Path(run)), Path(target))


def prepare_model(
    config: TrainingConfig, environment: EnvironmentReport, run: RunDir
) -> ModelSnapshot:
    """Run the model stage; a cached result only counts while its folder verifies."""
    source = resolve(config)
    target = snapshot_target(config, source, environment.device)
    gone = read_snapshot(target) is None
    return quantize.with_options(refresh_cache=gone)(
        config, source, environment.device, str(run.path), str(target)
    )
