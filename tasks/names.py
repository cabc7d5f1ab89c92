"""Names of task runs that say what is known of the task when it starts.

Each function takes the parameters of the task's call. A name begins with the stage's own word, by
which programs find it. Nothing in a name may fail a task.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, cast

from prefect.tasks import TaskRunNameCallbackWithParameters

from qwen3ft.jobs.folders import RunDir
from qwen3ft.records.evaluation import Champion
from qwen3ft.records.model import SavedAdapter
from qwen3ft.records.plan import TrainPlan
from qwen3ft.records.training import AttemptOutcome, Failure
from qwen3ft.recovery.adjust import FailedAttempt
from qwen3ft.report.attempts import kind_text


def name_of(name: Callable[[Mapping[str, Any]], str]) -> TaskRunNameCallbackWithParameters:
    """Cast `name` to Prefect's type; its argument must be called `parameters`."""
    return cast("TaskRunNameCallbackWithParameters", name)


def train_name(parameters: Mapping[str, Any]) -> str:
    """`train-2 (micro-batch 8 x 8 from step 40 after out of memory)`."""
    plan: TrainPlan = parameters["plan"]
    details = f"micro-batch {plan.memory.micro_batch_size} x {plan.gradient_accumulation_steps}"
    if plan.resume_from:
        step = Path(plan.resume_from).name.removeprefix("step-").lstrip("0") or "0"
        details += f" from step {step}"
    if (failure := _failure_before(plan)) is not None:
        details += f" after {kind_text(failure.kind)}"
    return f"train-{plan.attempt} ({details})"


def adjust_name(parameters: Mapping[str, Any]) -> str:
    """`adjust-1 (out of memory)`."""
    failed: Sequence[FailedAttempt] = parameters["failed"]
    plan, failure = failed[-1]
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
        return RunDir(Path(plan.run_dir)).attempt(plan.attempt - 1).read_failure()
    except (OSError, ValueError):
        return None
