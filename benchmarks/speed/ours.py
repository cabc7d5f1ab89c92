"""The product as a contestant: it plans as a run and trains by `qwen3ft.worker.jobs.train_job`.

The only addition is a clock among the trainer's callbacks.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from benchmarks.speed.cases import LEARNING_RATE, LORA_ALPHA, LORA_RANK, TOKENS

if TYPE_CHECKING:
    from benchmarks.speed.cases import Job
    from qwen3ft.records.data import DatasetManifest
    from qwen3ft.records.machine import EnvironmentReport
    from qwen3ft.records.plan import TrainPlan

HELD_OUT_ROWS = 8


def run_ours(job: Job) -> dict[str, Any]:
    """Plan and train; held-out rows are evaluated before the first and after the last step.

    Raises:
        InsufficientMemoryError: The case does not fit, by the plan.
    """
    plan = make_plan(job)
    from benchmarks.speed.probe import Clock
    from qwen3ft.jobs.folders import RunDir
    from qwen3ft.training.engine import TrainingEngine
    from qwen3ft.worker import jobs as worker

    observed: list[Clock] = []
    create_trainer = TrainingEngine.create_trainer

    def create_observed(engine: TrainingEngine, *args: Any, **kwargs: Any) -> Any:
        trainer = create_trainer(engine, *args, **kwargs)
        clock = Clock(job.warmup, job.started, lambda: [trainer.step_tokens])
        trainer.add_callback(clock)
        observed.append(clock)
        return trainer

    engine_class: Any = TrainingEngine
    engine_class.create_trainer = create_observed
    place = RunDir(Path(plan.run_dir)).attempt(1).create(plan)
    outcome = worker.train_job(worker.Job(place.path))
    return observed[0].result() | {
        "trainable_parameters": plan.adapter.trainable_parameters,
        "product_peak_gb": outcome.peak_memory_gb,
        "held_out_loss": [outcome.first_held_out_loss, outcome.best_held_out_loss],
        "predicted_peak_gb": plan.predicted_peak_bytes / 2**30,
        "levers": levers(plan),
        "reasons": plan.reasons,
    }


def levers(plan: TrainPlan) -> dict[str, Any]:
    """Return the plan's settings that are plain values."""
    values = plan.model_dump(mode="json", exclude={"run_id", "run_dir", "resume_from"})
    values |= values.pop("memory", {})  # versions before had the levers at the top
    values["gradient_accumulation_steps"] = plan.gradient_accumulation_steps
    plain = (int, float, str, bool, type(None))
    return {name: value for name, value in values.items() if isinstance(value, plain)}


def make_plan(job: Job, machine: EnvironmentReport | None = None, **changes: Any) -> TrainPlan:
    """Return the plan that `build_plan` makes of the job's case, with the workload as its data.

    Args:
        job: The contestant's training.
        machine: The machine to plan for; None for this one.
        changes: Settings that differ from those of the speed benchmark.

    Raises:
        InsufficientMemoryError: The case does not fit.
    """
    from qwen3ft.config import TrainingConfig
    from qwen3ft.machine.environment import EnvironmentManager
    from qwen3ft.model.adapter import plan_adapter
    from qwen3ft.planning.plan import build_plan
    from qwen3ft.records.model import ModelSnapshot

    case, settings = job.entry.case, job.entry.settings
    snapshot = ModelSnapshot.model_validate(job.snapshot)
    more: dict[str, Any] = dict(changes)
    if job.entry.contestant == "ours-plain" and "kernels" in TrainingConfig.model_fields:
        more["kernels"] = "plain"
    if not settings.recompute:
        more.setdefault("gradient_checkpointing", "off")
    config = TrainingConfig(
        model_name=snapshot.path,
        max_memory_gb=case.cap_gb,
        batch_size=settings.micro,
        gradient_accumulation_steps=settings.accumulate,
        max_sequence_length=case.sequence_tokens,
        lora_r=LORA_RANK,
        lora_alpha=LORA_ALPHA,
        learning_rate=LEARNING_RATE,
        max_steps=job.steps,
        num_epochs=1,
        evaluate_every_steps=job.steps,
        warmup_fraction=0.0,
        seed=job.seed,
        **more,
    )
    return build_plan(
        config,
        machine or EnvironmentManager().report(),
        snapshot,
        plan_adapter(config, snapshot.shape),
        write_dataset(job, job.folder / "data"),
        run_id="speed",
        run_dir=str(job.folder / "run"),
    )


def write_dataset(job: Job, folder: Path) -> DatasetManifest:
    """Write the workload as the data stage does: every token trained, a few rows held out too."""
    from qwen3ft.chat.rendering import TokenizedRow
    from qwen3ft.chat.words import packed
    from qwen3ft.data.token_table import TokenWriter, token_batch
    from qwen3ft.records.data import DatasetManifest

    folder.mkdir(parents=True)
    rows = [TokenizedRow(packed(row), [(0, len(row))]) for row in job.rows()]
    held_out = min(HELD_OUT_ROWS, job.entry.case.sequences_per_step)
    splits = {"train": rows, "dev": rows[:held_out]}
    summaries = {}
    for name, split in splits.items():
        with TokenWriter(folder / f"{name}.arrow") as writer:
            writer.write(token_batch(split))
        summaries[name] = writer.summary()
    return DatasetManifest(
        path=str(folder),
        digest=f"workload of {job.seed}, tokens below {TOKENS}",
        sources=(),
        rows_read=len(rows) + len(splits["dev"]),
        test_rows=0,
        quarantined=0,
        too_long=0,
        duplicates=0,
        max_sequence_length=job.entry.case.sequence_tokens,
        **summaries,
    )
