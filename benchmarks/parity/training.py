"""Training of one path: `python -m benchmarks.parity.training JOB.json`.

A job is one of the speed benchmark's kinds, or one of two more: the training of a path, carried out
as a run's worker does, and the gradients of a model. The rows are random tokens of few kinds, each
row once, so the loss falls to the entropy of their kinds.
"""

from __future__ import annotations

import json
import os
import shutil
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from benchmarks.machine import DeviceMemory
from benchmarks.speed.cases import LORA_ALPHA, LORA_RANK, Job
from benchmarks.speed.contestants import KINDS, main
from benchmarks.speed.ours import levers, write_dataset

if TYPE_CHECKING:
    from qwen3ft.records.model import ModelSnapshot
    from qwen3ft.records.plan import TrainPlan


def train(values: dict[str, Any]) -> dict[str, Any]:
    """Train, and return the losses and gradient norms of every step from metrics.jsonl.

    Args:
        values: A job of the speed benchmark whose `steps` are those of one epoch; and `kernels`,
            `learning_rate`, `total_steps`, and the `dtype` of products, None for the model's own.

    Raises:
        RuntimeError: The plan takes the other path, or steps are missing.
        InsufficientMemoryError: The training does not fit, by the plan.
    """
    plan = _plan(Job.read(values), values["kernels"], values["learning_rate"], values)
    if plan.memory.kernels != values["kernels"]:
        raise RuntimeError(
            f"the plan chose kernels {plan.memory.kernels}: {plan.reasons['kernels']}"
        )
    from qwen3ft.disk.files import read_json_lines
    from qwen3ft.jobs.folders import RunDir
    from qwen3ft.worker import jobs as worker

    place = RunDir(Path(plan.run_dir)).attempt(1).create(plan)
    started = time.monotonic()
    outcome = worker.train_job(worker.Job(place.path))
    lines = [line for line in read_json_lines(place.metrics) if line["loss"] is not None]
    steps = [line["step"] for line in lines]
    if steps != list(range(1, plan.total_steps + 1)):
        raise RuntimeError(f"metrics.jsonl has the steps {steps}")
    return {
        "losses": [line["loss"] for line in lines],
        "grad_norms": [line["grad_norm"] for line in lines],
        "held_out_loss": [outcome.first_held_out_loss, outcome.best_held_out_loss],
        "tokens_per_second": outcome.tokens_per_second,
        "peak_allocated_gb": outcome.peak_allocated_gb,
        "peak_reserved_gb": outcome.peak_reserved_gb,
        "seconds": time.monotonic() - started,
        "dataset": plan.dataset.digest,
        "levers": levers(plan),
        "reasons": plan.reasons,
    }


def _plan(job: Job, kernels: Any, learning_rate: float, values: dict[str, Any]) -> TrainPlan:
    """Return the plan that `build_plan` makes of the job."""
    from qwen3ft.config import TrainingConfig
    from qwen3ft.machine.environment import EnvironmentManager
    from qwen3ft.model.adapter import plan_adapter
    from qwen3ft.planning.plan import build_plan
    from qwen3ft.records.model import ModelSnapshot

    case, steps = job.entry.case, values["total_steps"]
    snapshot = ModelSnapshot.model_validate(job.snapshot)
    if values["dtype"]:
        snapshot = _computing_in(values["dtype"], snapshot, job.folder / "model")
    config = TrainingConfig(
        model_name=snapshot.path,
        max_memory_gb=case.cap_gb,
        batch_size=case.sequences_per_step,
        gradient_accumulation_steps=1,
        max_sequence_length=case.sequence_tokens,
        lora_r=LORA_RANK,
        lora_alpha=LORA_ALPHA,
        learning_rate=learning_rate,
        max_steps=steps,
        num_epochs=-(-steps // job.steps),
        evaluate_every_steps=steps,
        warmup_fraction=0.0,
        seed=job.seed,
        kernels=kernels,
    )
    return build_plan(
        config,
        EnvironmentManager().report(),
        snapshot,
        plan_adapter(config, snapshot.shape),
        write_dataset(job, job.folder / "data"),
        run_id="parity",
        run_dir=str(job.folder / "run"),
    )


def _computing_in(dtype: Any, snapshot: ModelSnapshot, folder: Path) -> ModelSnapshot:
    """Link the same 4-bit weights into `folder`, to be loaded with products in `dtype`."""
    shutil.copytree(snapshot.path, folder, copy_function=os.link)
    changed = {
        "config.json": ("quantization_config", "bnb_4bit_compute_dtype"),
        "manifest.json": ("facts", "compute_dtype"),
    }
    for name, (part, key) in changed.items():
        values = json.loads((folder / name).read_text(encoding="utf-8"))
        values[part][key] = dtype
        (folder / name).unlink()  # it is a hard link: writing would change the original
        (folder / name).write_text(json.dumps(values), encoding="utf-8")
    return snapshot.model_copy(update={"path": str(folder), "compute_dtype": dtype})


def _training(values: dict[str, Any], memory: DeviceMemory) -> dict[str, Any]:
    return train(values) | {"nvml_peak_gb": memory.stop()}


def _gradients(values: dict[str, Any], memory: DeviceMemory) -> dict[str, Any]:
    from benchmarks.parity.gradients import measure

    return measure(values) | {"nvml_peak_gb": memory.stop()}


KINDS |= {"training": _training, "gradients": _gradients}

if __name__ == "__main__":
    main(Path(sys.argv[1]))
