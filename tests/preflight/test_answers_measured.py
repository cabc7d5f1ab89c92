"""The preflight makes and fills the decoder of the inference test."""

from __future__ import annotations

from typing import Any

import pytest
from support.finished_run import make_plan
from support.plans import environment
from support.preflights import report_of
from support.trained_adapter import Trained

from qwen3ft.config import TrainingConfig
from qwen3ft.evaluation.inference import InferenceTester
from qwen3ft.planning.answers import decoder_load
from qwen3ft.preflight.answers import measure_answers
from qwen3ft.preflight.report import preflight_markdown
from qwen3ft.records.plan import TrainPlan

HERE = environment(None)


@pytest.fixture
def plan(trained: Trained) -> TrainPlan:
    return make_plan(trained.snapshot, max_memory_gb=4.0)


def load_for(plan: TrainPlan, **changes: Any) -> dict[str, Any]:
    config = TrainingConfig(kernels="fused", inference_rows=2, max_new_tokens=8, **changes)
    load = decoder_load(config, HERE, plan)
    assert load is not None
    return load


def test_the_decoder_is_made_and_filled(trained: Trained, plan: TrainPlan) -> None:
    """With two adapters, as candidate and champion will be; the page shows what it took."""
    model, _ = InferenceTester(trained.config).load_finetuned_model(str(trained.adapter))
    measured = measure_answers(model, plan, load_for(plan))
    assert measured.by.startswith("the decoder: ")
    assert (measured.predicted_bytes or 0) > (measured.measured_bytes or 0) / 4 > 0
    assert (measured.step_seconds or 0) > 0
    page = preflight_markdown([report_of(plan).model_copy(update={"answers": measured})])
    assert f"Answers by {measured.by}" in page
    assert "ms a step" in page


def test_a_budget_without_room_is_said(trained: Trained, plan: TrainPlan) -> None:
    """It leaves the measurement of training as it is."""
    model, _ = InferenceTester(trained.config).load_finetuned_model(str(trained.adapter))
    scarce = plan.model_copy(update={"max_memory_gb": 0.01})
    measured = measure_answers(model, scarce, load_for(plan))
    assert "does not fit the budget" in measured.by
    assert measured.measured_bytes is None


def test_nothing_is_measured_where_transformers_answers(plan: TrainPlan) -> None:
    """As on a CPU."""
    assert decoder_load(TrainingConfig(), HERE, plan) is None
