"""Resolve a config, a machine, a model and its data into the plan of a training attempt.

Pure and deterministic. The effective batch is exactly the one asked for, the predicted peak fits
the budget, and each derived value has its reason in a sentence.
"""

from __future__ import annotations

import math

from qwen3ft.config import TrainingConfig
from qwen3ft.errors import DataLoadingError
from qwen3ft.planning.fit import choose
from qwen3ft.planning.footprint import predict_memory
from qwen3ft.planning.workload import request_for, workload_of
from qwen3ft.records.data import DatasetManifest
from qwen3ft.records.machine import EnvironmentReport
from qwen3ft.records.model import AdapterSpec, ModelSnapshot
from qwen3ft.records.plan import TrainPlan

# Checkpoints are as far apart, so a crash costs at most the longest interval. The shortest keeps
# tiny data sets from being evaluated more than trained on.
LONGEST_EVALUATION_INTERVAL_STEPS = 200
SHORTEST_EVALUATION_INTERVAL_STEPS = 10


def build_plan(
    config: TrainingConfig,
    environment: EnvironmentReport,
    model: ModelSnapshot,
    adapter: AdapterSpec,
    dataset: DatasetManifest,
    *,
    run_id: str = "",
    run_dir: str = "",
) -> TrainPlan:
    """Return the plan of the first attempt: the fastest settings predicted to fit the budget.

    Args:
        config: The run's settings.
        environment: The machine.
        model: The quantised base model.
        adapter: The adapter that is trained.
        dataset: The rows and their lengths.
        run_id: Name of the run; empty for a plan that belongs to none yet.
        run_dir: The run's folder.

    Raises:
        InsufficientMemoryError: Nothing fits; lists each part, and what would fit.
        DataLoadingError: There is no row to train on.
    """
    if dataset.train.rows == 0:
        raise DataLoadingError(
            f"None of the {dataset.rows_read} rows read can be trained on.",
            why=f"Left out: {dataset.quarantined} bad, {dataset.too_long} too long, "
            f"{dataset.duplicates} double.",
            next_command="qwen3ft data check",
        )
    choice = choose(request_for(config, environment, model, adapter, dataset))
    schedule, schedule_reasons = _schedule(config, dataset.train.rows)
    return TrainPlan(
        attempt=1,
        run_id=run_id,
        run_dir=run_dir,
        model=model,
        adapter=adapter,
        dataset=dataset,
        device=environment.device,
        places=tuple(range(choice.work.ranks)),
        places_per_host=choice.work.ranks // config.hosts if config.hosts > 1 else None,
        max_memory_gb=choice.budget_gb,
        memory=choice.work.memory,
        effective_batch_size=config.effective_batch_size,
        max_sequence_length=config.max_sequence_length,
        learning_rate=config.learning_rate,
        lr_scheduler=config.lr_scheduler,
        num_epochs=config.num_epochs,
        weight_decay=config.weight_decay,
        max_grad_norm=config.max_grad_norm,
        early_stopping_patience=config.early_stopping_patience,
        keep_checkpoints=config.keep_checkpoints,
        seed=config.seed,
        stall_seconds=config.stall_seconds,
        memory_history=config.memory_history,
        predicted=choice.parts,
        reasons=choice.reasons | schedule_reasons,
        degraded=tuple(dict.fromkeys(model.degraded + dataset.degraded)),
        **schedule,
    )


def repredict(plan: TrainPlan) -> TrainPlan:
    """Return `plan` with the memory predicted anew for its settings."""
    return plan.model_copy(update={"predicted": predict_memory(workload_of(plan))})


def _schedule(config: TrainingConfig, rows: int) -> tuple[dict[str, int], dict[str, str]]:
    """Return the counts of optimizer steps, and why they are so."""
    effective = config.effective_batch_size
    per_epoch = -(-rows // effective)
    total = per_epoch * config.num_epochs
    total_reason = f"{per_epoch} steps an epoch ({rows} rows / {effective}) x {config.num_epochs}."
    if config.max_steps is not None and config.max_steps < total:
        total, total_reason = config.max_steps, f"max_steps; all epochs would be {total}."
    warmup = min(math.ceil(config.warmup_fraction * total), per_epoch)
    if config.evaluate_every_steps is not None:
        every = min(config.evaluate_every_steps, total)
        every_reason = f"As configured, {config.evaluate_every_steps}, within {total} steps."
    else:
        every = min(max(per_epoch, SHORTEST_EVALUATION_INTERVAL_STEPS), total)
        every = min(every, LONGEST_EVALUATION_INTERVAL_STEPS)
        every_reason = (
            f"Once an epoch ({per_epoch} steps), but {SHORTEST_EVALUATION_INTERVAL_STEPS} to "
            f"{LONGEST_EVALUATION_INTERVAL_STEPS} steps apart; checkpoints are as far apart."
        )
    counts = {"total_steps": total, "warmup_steps": warmup, "evaluate_every_steps": every}
    warmup_reason = f"{config.warmup_fraction:.1%} of {total} steps, one epoch at most."
    return counts, dict(zip(counts, (total_reason, warmup_reason, every_reason), strict=True))
