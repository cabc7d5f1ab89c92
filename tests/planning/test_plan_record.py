"""A plan as JSON: read again as it was written, also by the version before."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError
from support.plans import plan_for

from qwen3ft.jobs.folders import RunDir
from qwen3ft.planning.plan import repredict
from qwen3ft.records.plan import MemorySettings, TrainPlan
from qwen3ft.report.attempts import read_attempts
from qwen3ft.tracking.journal import flat_params

OLD = Path(__file__).with_name("plan_format_1.json")
"""A run's plan.json from before the memory levers had a record of their own."""

LEVERS = {
    "kernels": "fused",
    "micro_batch_size": 8,
    "eval_batch_size": 16,
    "packing": True,
    "gradient_checkpointing": True,
    "loss_chunk_tokens": 512,
    "offload_activations": True,
    "offload_optimizer": True,
    "offload_attention": True,
    "offloaded_mlp_blocks": 3,
    "activation_bytes": 2**30,
    "chunk_tokens": 4096,
    "head_groups": 2,
}


def old_values(**changes: Any) -> dict[str, Any]:
    return {**json.loads(OLD.read_text(encoding="utf-8")), **changes}


def test_a_plan_of_the_version_before_is_read_and_written_in_todays_format() -> None:
    """Its levers, its batch and its prediction are what they were."""
    plan = TrainPlan.model_validate_json(OLD.read_text(encoding="utf-8"))
    assert (plan.memory.micro_batch_size, plan.gradient_accumulation_steps) == (16, 1)
    assert (plan.effective_batch_size, plan.memory.eval_batch_size) == (16, 32)
    assert repredict(plan) == plan
    text = plan.model_dump_json()
    assert json.loads(text)["format_version"] == 2
    assert TrainPlan.model_validate_json(text) == plan


def test_every_lever_of_the_version_before_is_kept() -> None:
    """None falls back to its default."""
    assert set(LEVERS) == set(MemorySettings.model_fields) - {"graphs"}  # it had none
    plan = TrainPlan.model_validate(old_values(**LEVERS, gradient_accumulation_steps=4))
    assert plan.memory.model_dump() == {**LEVERS, "graphs": False}
    assert plan.effective_batch_size == 32


def test_a_run_of_the_version_before_is_listed_and_continued(tmp_path: Path) -> None:
    """The run card reads its attempts; the next attempt starts from its plan."""
    job = RunDir(tmp_path).attempt(1)
    job.path.mkdir(parents=True)
    job.request.write_bytes(OLD.read_bytes())
    [attempt] = read_attempts(RunDir(tmp_path), ())
    assert (attempt.micro_batch_size, attempt.gradient_accumulation_steps) == (16, 1)


def test_parameters_in_mlflow_have_the_names_that_runs_always_had() -> None:
    """Levers stand beside the other settings, so that old and new runs compare."""
    params = flat_params(TrainPlan.model_validate(old_values()))
    unknown = {"predicted", "reasons", "model", "adapter", "dataset"}
    assert set(old_values()) - unknown <= params.keys()
    assert params["effective_batch_size"] == 16
    assert not any(name.startswith(("memory.", "format")) for name in params)


def test_a_plan_of_a_later_version_is_refused() -> None:
    """Rather than read without what it says."""
    later = plan_for().model_dump(mode="json") | {"format_version": 3}
    with pytest.raises(ValidationError, match="format_version"):
        TrainPlan.model_validate(later)


def test_levers_are_changed_and_read_by_their_own_names() -> None:
    """Beside other settings; a name that is none of either is refused."""
    plan = plan_for()
    other = plan.with_settings(micro_batch_size=1, learning_rate=1e-6)
    assert (other.memory.micro_batch_size, other.learning_rate) == (1, 1e-6)
    assert other.effective_batch_size == plan.effective_batch_size
    assert other.gradient_accumulation_steps == plan.effective_batch_size
    assert (other.setting("micro_batch_size"), other.setting("learning_rate")) == (1, 1e-6)
    with pytest.raises(ValueError, match="mikro"):
        plan.with_settings(mikro_batch_size=1)
