"""Cache of preflight reports, a JSON file each, found by everything their memory depends on.

Runs with the same key have the same memory levers, the same lengths in their worst batches, and the
same GPU, driver and libraries. Not in the key: the text of the rows, and how many of their tokens
are trained, which only decides how full the last loss chunk is.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from importlib import metadata
from pathlib import Path

from pydantic import ValidationError

from qwen3ft.config import TrainingConfig
from qwen3ft.disk.files import sha256_json
from qwen3ft.jobs.folders import read_record, write_record
from qwen3ft.logs import get_logger
from qwen3ft.records.machine import EnvironmentReport
from qwen3ft.records.plan import TrainPlan
from qwen3ft.records.preflight import PreflightReport, WorstBatches
from qwen3ft.units import GIB

logger = get_logger("preflight")

REPORT_VERSION = 1
"""Version of the reports; raised when older ones must not be reused."""

MEMORY_LIBRARIES = ("torch", "transformers", "peft", "bitsandbytes", "triton", "accelerate")

WITHOUT_EFFECT = frozenset(
    {
        *("attempt", "run_id", "run_dir", "resume_from", "reasons", "degraded", "dataset"),
        *("learning_rate", "lr_scheduler", "warmup_steps", "weight_decay", "max_grad_norm"),
        *("total_steps", "num_epochs", "evaluate_every_steps", "early_stopping_patience"),
        *("keep_checkpoints", "seed", "stall_seconds", "model"),
    }
)
"""Fields of a plan that memory does not depend on, or that the key holds in another form."""


def report_key(
    plan: TrainPlan,
    environment: EnvironmentReport,
    batches: WorstBatches,
    faults: Iterable[object] = (),
) -> str:
    """Return the key of a report of `plan`."""
    gpu_info = environment.gpus[0] if environment.gpus else None
    gpu = gpu_info and [gpu_info.name, gpu_info.uuid, gpu_info.total_bytes, gpu_info.driver_version]
    versions = {name: environment.versions.get(name) for name in MEMORY_LIBRARIES}
    levers = plan.model_dump(mode="json", exclude=set(WITHOUT_EFFECT))
    lengths = [
        [batch.lengths for batch in of_split] for of_split in (batches.train, batches.evaluate)
    ]
    return sha256_json(
        [
            [REPORT_VERSION, metadata.version("qwen3ft"), versions, environment.python_version],
            [gpu, environment.host_total_bytes, environment.cpu_count],
            [plan.model.manifest_sha256, plan.model.quantization, plan.model.compute_dtype],
            [plan.model.shape.model_dump(mode="json"), levers, lengths, batches.accumulates],
            # Reports of planted faults must not be found by real runs.
            [str(fault) for fault in faults],
        ]
    )


def read_report(config: TrainingConfig, key: str) -> PreflightReport | None:
    """Return the report kept under `key`; None if there is none that can be read."""
    path = report_path(config, key)
    if not path.exists():
        return None
    try:
        report = read_record(path, PreflightReport)
    except (OSError, ValidationError, json.JSONDecodeError, UnicodeDecodeError) as error:
        logger.warning(
            "%s cannot be read, so the plan is measured again: %s", path, type(error).__name__
        )
        return None
    return report.model_copy(update={"from_cache": True})


def keep_report(
    config: TrainingConfig, environment: EnvironmentReport, report: PreflightReport
) -> None:
    """Keep `report` for later runs, if it will hold for them too."""
    # Memory that ran out while other programs held a part of it says nothing about the plan.
    if not report.fitted and _free_bytes(environment) < report.budget_bytes:
        return
    path = report_path(config, report.key)
    path.parent.mkdir(parents=True, exist_ok=True)
    write_record(path, report)


def report_path(config: TrainingConfig, key: str) -> Path:
    """Return where the report of `key` is, or would be."""
    return Path(config.cache_dir).resolve() / "preflight" / f"{key}.json"


def _free_bytes(environment: EnvironmentReport) -> int:
    """Return what was free on the device before the run took any."""
    gpu_info = environment.gpus[0] if environment.gpus else None
    # CUDA itself takes some of a GPU that nobody uses.
    return gpu_info.free_bytes + GIB if gpu_info else environment.host_free_bytes
