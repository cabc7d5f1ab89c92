"""Reports of earlier preflights, a JSON file each, found by all that their memory depends on.

Guarantees: a report is written whole or not at all; one that cannot be read counts as none. Two
runs with the same key have the same plan as far as memory goes, the same lengths in their worst
batches, the same card, driver and libraries. Not in the key: what is in the rows, and how many of
their tokens are trained, which decides how full the last chunk of the loss is.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from importlib import metadata
from pathlib import Path

from pydantic import ValidationError

from qwen3ft.config import TrainingConfig
from qwen3ft.files import sha256_json
from qwen3ft.jobs.folders import read_record, write_record
from qwen3ft.logs import get_logger
from qwen3ft.records.machine import EnvironmentReport
from qwen3ft.records.plan import TrainPlan
from qwen3ft.records.preflight import PreflightReport, WorstBatches
from qwen3ft.units import GIB

logger = get_logger("preflight")

CACHE_VERSION = 1
"""Raised when reports of older versions must not be reused."""

LIBRARIES = ("torch", "transformers", "peft", "bitsandbytes", "triton", "accelerate")

WITHOUT_EFFECT = frozenset(
    {
        *("attempt", "run_id", "run_dir", "resume_from", "reasons", "degraded", "dataset"),
        *("learning_rate", "lr_scheduler", "warmup_steps", "weight_decay", "max_grad_norm"),
        *("total_steps", "num_epochs", "evaluate_every_steps", "early_stopping_patience"),
        *("keep_checkpoints", "seed", "stall_seconds", "model"),
    }
)
"""Fields of a plan that its memory does not depend on, or that stand in the key otherwise."""


def report_key(
    plan: TrainPlan,
    environment: EnvironmentReport,
    batches: WorstBatches,
    faults: Iterable[object] = (),
) -> str:
    """The key of a report of `plan`; planted faults are part of it, to stay out of real runs."""
    card = environment.gpus[0] if environment.gpus else None
    gpu = card and [card.name, card.uuid, card.total_bytes, card.driver_version]
    versions = {name: environment.versions.get(name) for name in LIBRARIES}
    levers = plan.model_dump(mode="json", exclude=set(WITHOUT_EFFECT))
    lengths = [
        [batch.lengths for batch in of_split] for of_split in (batches.train, batches.evaluate)
    ]
    return sha256_json(
        [
            [CACHE_VERSION, metadata.version("qwen3ft"), versions, environment.python_version],
            [gpu, environment.host_total_bytes, environment.cpu_count],
            [plan.model.manifest_sha256, plan.model.quantization, plan.model.compute_dtype],
            [plan.model.shape.model_dump(mode="json"), levers, lengths, batches.accumulates],
            [str(fault) for fault in faults],
        ]
    )


def read_report(config: TrainingConfig, key: str) -> PreflightReport | None:
    """The report kept under `key`, or None."""
    path = report_path(config, key)
    if not path.exists():
        return None
    try:
        report = read_record(path, PreflightReport)
    except (OSError, ValidationError, json.JSONDecodeError, UnicodeDecodeError) as error:
        logger.warning("%s cannot be read and is measured anew: %s", path, type(error).__name__)
        return None
    return report.model_copy(update={"from_cache": True})


def keep_report(
    config: TrainingConfig, environment: EnvironmentReport, report: PreflightReport
) -> None:
    """Keep `report` for later runs, if what it says will hold then too.

    Memory that ran out while other programs held a part of it says nothing about the plan.
    """
    if not report.fitted and _free_bytes(environment) < report.budget_bytes:
        return
    path = report_path(config, report.key)
    path.parent.mkdir(parents=True, exist_ok=True)
    write_record(path, report)


def report_path(config: TrainingConfig, key: str) -> Path:
    """Where the report of `key` is, or would be."""
    return Path(config.cache_dir).resolve() / "preflight" / f"{key}.json"


def _free_bytes(environment: EnvironmentReport) -> int:
    """Before the run took any."""
    card = environment.gpus[0] if environment.gpus else None
    # CUDA itself takes some of a card that nobody uses.
    return card.free_bytes + GIB if card else environment.host_free_bytes
