"""The plan of a run without training; workers do what no earlier run has done."""

from __future__ import annotations

from pathlib import Path

from qwen3ft.config import TrainingConfig
from qwen3ft.data.folder import read_manifest
from qwen3ft.data.pipeline import dataset_target, make_dataset
from qwen3ft.data.sources import resolved
from qwen3ft.jobs.folders import RunDir
from qwen3ft.machine.environment import EnvironmentManager
from qwen3ft.model.adapter import plan_adapter
from qwen3ft.model.hub import resolve_model
from qwen3ft.model.manager import snapshot_target
from qwen3ft.model.stage import quantized_model
from qwen3ft.planning.plan import build_plan
from qwen3ft.records.plan import TrainPlan


def preview_plan(config: TrainingConfig) -> TrainPlan:
    """Return the plan of a run's first attempt, from the same stages, without training.

    Quantises the model and tokenises the rows if no earlier call or run did.
    """
    environment = EnvironmentManager().report()
    scratch = RunDir(Path(config.cache_dir).resolve() / "preview")
    source = resolve_model(config)
    target = snapshot_target(config, source, environment.device)
    model = quantized_model(config, source, environment.device, scratch, target)
    sources = resolved(config)
    rows = dataset_target(sources, model)
    dataset = read_manifest(rows) or make_dataset(sources, model, scratch, rows)
    return build_plan(config, environment, model, plan_adapter(config, model.shape), dataset)
