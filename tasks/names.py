"""Names of task runs that tell the story of a run, as far as it is known when a task starts.

Each takes the parameters of the task's call, as Prefect hands them over. A name begins with the
stage's own word, by which programs find it. Nothing in a name may fail a task.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, cast

from prefect.tasks import TaskRunNameCallbackWithParameters

from qwen3ft.jobs.folders import RunDir
from qwen3ft.records.evaluation import Champion
from qwen3ft.records.model import SavedAdapter
from qwen3ft.records.plan import TrainPlan
from qwen3ft.records.training import AttemptOutcome, Failure
from qwen3ft.report.attempts import kind_text, last_failure


def name_of(tell: Callable[[Mapping[str, Any]], str]) -> TaskRunNameCallbackWithParameters:
    """`tell` in Prefect's type, which no plain function has; its argument must be `parameters`."""
    return cast("TaskRunNameCallbackWithParameters", tell)


def train_name(parameters: Mapping[str, Any]) -> str:
    """`train-2 (micro-batch 8 x 8 from step 40 after out of memory)`."""
    plan: TrainPlan = parameters["plan"]
    told = f"micro-batch {plan.memory.micro_batch_size} x {plan.gradient_accumulation_steps}"
    if plan.resume_from:
        step = Path(plan.resume_from).name.removeprefix("step-").lstrip("0") or "0"
        told += f" from step {step}"
    if (failure := _failure_before(plan)) is not None:
        told += f" after {kind_text(failure.kind)}"
    return f"train-{plan.attempt} ({told})"


def adjust_name(parameters: Mapping[str, Any]) -> str:
    """`adjust-1 (out of memory)`."""
    plan: TrainPlan = parameters["plan"]
    failure: Failure = parameters["failure"]
    return f"adjust-{plan.attempt} ({kind_text(failure.kind)})"


def save_name(parameters: Mapping[str, Any]) -> str:
    """`save (step 40 of attempt 2)`."""
    outcome: AttemptOutcome = parameters["outcome"]
    return f"save (step {outcome.best_step:,} of attempt {outcome.attempt})"


def inference_name(parameters: Mapping[str, Any]) -> str:
    """`inference (candidate, base and champion v7)`."""
    champion: Champion | None = parameters["champion"]
    rivals = f", base and champion v{champion.version}" if champion else " and base"
    return f"inference (candidate{rivals})"


def promote_name(parameters: Mapping[str, Any]) -> str:
    """`promote (v8 against v7)`."""
    saved: SavedAdapter = parameters["saved"]
    champion: Champion | None = parameters["champion"]
    mine = f"v{saved.version}" if saved.version else "not registered"
    return f"promote ({mine} against {f'v{champion.version}' if champion else 'the base model'})"


def _failure_before(plan: TrainPlan) -> Failure | None:
    try:
        return last_failure(RunDir(Path(plan.run_dir)), plan.attempt)
    except (OSError, ValueError):
        return None
