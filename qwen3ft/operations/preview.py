"""What must be on disk before training: a quantised model and tokenised rows, each made once.

Runs in the flow's process; the work itself is done by workers. A folder that verifies is used as it
is, whoever made it.
"""

from __future__ import annotations

from pathlib import Path
from typing import Literal, cast

from qwen3ft.config import TrainingConfig
from qwen3ft.data.pipeline import dataset_target, fingerprint_sources, read_manifest
from qwen3ft.jobs.folders import RunDir
from qwen3ft.jobs.launcher import run_worker
from qwen3ft.machine.environment import EnvironmentManager
from qwen3ft.model.adapter import plan_adapter
from qwen3ft.model.hub import fetch_model, resolve_model
from qwen3ft.model.manager import read_snapshot, snapshot_target
from qwen3ft.planning.plan import build_plan
from qwen3ft.records.data import DatasetManifest
from qwen3ft.records.plan import ModelSnapshot, ModelSource, TrainPlan
from qwen3ft.records.requests import DataRequest, QuantizeRequest


def quantized_model(
    config: TrainingConfig, source: ModelSource, device: str, run: RunDir, target: Path
) -> ModelSnapshot:
    """The 4-bit model at `target`, fetched and quantised if it is not there or does not verify."""
    if (snapshot := read_snapshot(target)) is not None:
        return snapshot
    request = QuantizeRequest(
        config=config,
        source=source,
        source_path=str(fetch_model(source)),
        target=str(target),
        device=cast(Literal["cuda", "cpu"], device),
    )
    job = run.job("quantize").create(request)
    return run_worker("quantize", job, ModelSnapshot, stall_seconds=config.stall_seconds)


def tokenized_data(
    config: TrainingConfig,
    model: ModelSnapshot,
    run: RunDir,
    target: Path,
    known_rows: str | None = None,
) -> DatasetManifest:
    """The rows at `target`, read and tokenised if they are not there or do not verify."""
    if (manifest := read_manifest(target)) is not None:
        return manifest
    request = DataRequest(config=config, model=model, target=str(target), known_rows=known_rows)
    job = run.job("data").create(request)
    return run_worker("data", job, DatasetManifest, stall_seconds=config.stall_seconds)


def preview_plan(config: TrainingConfig) -> TrainPlan:
    """The plan of the first attempt, from the same stages as a run's, without training.

    Quantises the model and tokenises the rows if no earlier call or run did.
    """
    environment = EnvironmentManager().report()
    scratch = RunDir(Path(config.cache_dir).resolve() / "preview")
    source = resolve_model(config)
    target = snapshot_target(config, source, environment.device)
    model = quantized_model(config, source, environment.device, scratch, target)
    rows = dataset_target(config, model, fingerprint_sources(config))
    dataset = tokenized_data(config, model, scratch, rows)
    return build_plan(config, environment, model, plan_adapter(config, model.shape), dataset)
