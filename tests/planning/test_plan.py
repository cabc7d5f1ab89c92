"""The plan: what fits a budget, steps, and a reason for each derived value."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
from support.plans import QWEN3_4B, QWEN3_14B, TINY, environment, manifest, plan_for, snapshot

from qwen3ft.config import TrainingConfig
from qwen3ft.errors import DataLoadingError, InsufficientMemoryError
from qwen3ft.model.shapes import plan_adapter
from qwen3ft.planning.plan import build_plan, repredict
from qwen3ft.records.model import ModelShape
from qwen3ft.records.plan import MemorySettings, TrainPlan
from qwen3ft.units import GIB


def test_the_default_request_fits_thirteen_gb() -> None:
    """Qwen3-4B, 256 tokens, 4 x 16, 13 GB: the settings asked for are kept."""
    plan = plan_for()
    assert (plan.memory.micro_batch_size, plan.gradient_accumulation_steps) == (4, 16)
    assert plan.predicted_peak_bytes <= 13 * GIB
    assert plan.device == "cuda"


def test_two_gb_for_a_4b_model_are_refused_with_every_part() -> None:
    """The refusal says part by part what is needed."""
    with pytest.raises(InsufficientMemoryError) as caught:
        plan_for(max_memory_gb=2.0, longest_tokens=262144, max_sequence_length=262144)
    message = str(caught.value)
    assert caught.value.facts["have_gb"] == 2.0
    for name, size_bytes in caught.value.facts["parts"].items():
        assert f"{name:<24}{size_bytes / GIB:8.3f} GB" in message
    assert "max_memory_gb" in caught.value.facts["would_fit"]
    assert "max_sequence_length" not in caught.value.facts["would_fit"]


def test_what_a_refusal_offers_does_fit() -> None:
    """Each alternative of the message leads to a plan."""
    request = {"max_sequence_length": 131072, "longest_tokens": 131072, "max_memory_gb": 13.0}
    with pytest.raises(InsufficientMemoryError) as caught:
        plan_for(**request, gpu_gb=200.0)
    fits = caught.value.facts["would_fit"]
    assert plan_for(**{**request, "max_memory_gb": fits["max_memory_gb"]}, gpu_gb=200.0)
    shorter = {**request, "max_sequence_length": fits["max_sequence_length"]}
    assert plan_for(**shorter).predicted_peak_bytes <= 13 * GIB
    longer = {**request, "max_sequence_length": fits["max_sequence_length"] + 8}
    with pytest.raises(InsufficientMemoryError):
        plan_for(**longer)


@pytest.mark.parametrize("budget_gb", [4.5, 5, 6, 8, 10, 12, 13, 16, 24])
@pytest.mark.parametrize("shape", [QWEN3_4B, QWEN3_14B], ids=["4b", "14b"])
def test_every_budget_gives_a_plan_within_it_or_a_refusal(
    budget_gb: float, shape: ModelShape
) -> None:
    """No plan is predicted to exceed its budget, and the effective batch is always kept."""
    request = {"max_memory_gb": budget_gb, "batch_size": 32}
    if shape is QWEN3_14B and budget_gb < 11:
        with pytest.raises(InsufficientMemoryError) as caught:
            plan_for(shape, **request)
        assert caught.value.facts["need_gb"] > budget_gb
        return
    plan = plan_for(shape, **request)
    assert plan.predicted_peak_bytes <= budget_gb * GIB
    assert plan.effective_batch_size == 32 * 16
    assert plan == repredict(plan)


def test_a_smaller_budget_never_gives_a_larger_micro_batch() -> None:
    """Less memory leads to leaner settings, in the order of what they cost."""
    plans = [
        plan_for(batch_size=64, gradient_accumulation_steps=1, max_memory_gb=budget_gb / 2)
        for budget_gb in range(9, 49)
    ]
    for leaner, richer in itertools.pairwise(plans):
        assert leaner.memory.micro_batch_size <= richer.memory.micro_batch_size


def test_recomputation_is_chosen_only_where_it_is_needed() -> None:
    """Auto keeps everything while that takes 85 % of the budget; on and off are obeyed."""
    assert not plan_for(max_memory_gb=24.0).memory.gradient_checkpointing
    assert plan_for(max_memory_gb=8.0).memory.gradient_checkpointing
    assert plan_for(max_memory_gb=24.0, gradient_checkpointing="on").memory.gradient_checkpointing
    off = plan_for(max_memory_gb=8.0, gradient_checkpointing="off")
    assert not off.memory.gradient_checkpointing
    assert off.memory.micro_batch_size < 4


def test_a_batch_that_is_no_power_of_two_is_split_into_divisors() -> None:
    """The effective batch of 7 x 9 = 63 stays, whatever fits."""
    for budget_gb in (4.0, 4.5, 5.0, 8.0, 24.0):
        plan = plan_for(batch_size=7, gradient_accumulation_steps=9, max_memory_gb=budget_gb)
        assert plan.effective_batch_size == 63


def test_the_longest_real_row_counts_not_the_limit() -> None:
    """A generous limit does not cost memory that no row needs."""
    short = plan_for(longest_tokens=120, max_sequence_length=8192)
    assert short.predicted == plan_for(longest_tokens=120).predicted
    assert short.max_sequence_length == 8192


def test_a_budget_above_the_device_is_lowered_and_says_so() -> None:
    """The GPU's total bounds the plan."""
    plan = plan_for(max_memory_gb=1000.0, gpu_gb=24.0)
    assert plan.max_memory_gb == 24.0
    assert "1000 GB were allowed" in plan.reasons["max_memory_gb"]


def test_hosts_give_as_many_places_each() -> None:
    """The run's own host first; the rest of the plan is that of as many GPUs on one host."""
    two, machine = TrainingConfig(hosts=2), environment(80.0)
    plan = build_plan(two, machine, snapshot(), plan_adapter(two, QWEN3_4B), manifest())
    assert (plan.places, plan.places_per_host, plan.hosts) == ((0, 1), 1, (0, 1))
    assert [plan.places_on(host) for host in plan.hosts] == [(0,), (1,)]
    assert [plan.ranks_on(host) for host in plan.hosts] == [(0,), (1,)]
    assert repredict(plan).predicted == plan.predicted
    alone = plan_for()
    assert (alone.places_per_host, alone.hosts) == (None, (0,))


def test_on_a_cpu_the_budget_is_resident_memory() -> None:
    """The tiny model fits a laptop; evaluation takes many rows at once; nothing is offloaded."""
    plan = plan_for(TINY, gpu_gb=None, max_memory_gb=2.0)
    assert plan.device == "cpu"
    assert plan.memory.eval_batch_size == 32
    assert not plan.memory.gradient_checkpointing
    assert not plan.memory.offload_activations
    with pytest.raises(InsufficientMemoryError):
        plan_for(TINY, gpu_gb=None, max_memory_gb=0.5)


def test_an_evaluation_does_not_raise_the_peak_on_a_gpu() -> None:
    """The evaluation batch is bounded by what training takes anyway."""
    plan = plan_for()
    alone = repredict(plan.with_settings(eval_batch_size=1))
    assert plan.predicted_peak_bytes == alone.predicted_peak_bytes
    assert plan.memory.eval_batch_size >= plan.memory.micro_batch_size


def test_the_last_resort_on_a_gpu_is_host_memory() -> None:
    """Activations are offloaded only where nothing else fits."""
    with_all = [
        plan
        for budget_gb in range(40, 130)
        if (plan := _plan_or_none(max_memory_gb=budget_gb / 10, longest_tokens=8192))
    ]
    assert any(plan.memory.offload_activations for plan in with_all)
    assert all(
        plan.memory.micro_batch_size == 1 for plan in with_all if plan.memory.offload_activations
    )


def _plan_or_none(**request: Any) -> TrainPlan | None:
    try:
        return plan_for(max_sequence_length=8192, **request)
    except InsufficientMemoryError:
        return None


def test_steps_follow_from_rows_epochs_and_limits() -> None:
    """ceil(rows / effective) an epoch; max_steps cuts; warm-up ends within the first epoch."""
    plan = plan_for(rows=7473)
    assert plan.total_steps == 117 * 100
    assert plan.evaluate_every_steps == 117
    assert plan.warmup_steps == 117
    assert plan_for(max_steps=50).total_steps == 50
    assert plan_for(max_steps=50).evaluate_every_steps == 50
    assert plan_for(max_steps=50).warmup_steps == 2
    assert plan_for(warmup_fraction=0.0).warmup_steps == 0
    assert plan_for(rows=1, num_epochs=3).total_steps == 3
    assert plan_for(rows=1, num_epochs=3).evaluate_every_steps == 3
    assert plan_for(rows=10**6).evaluate_every_steps == 200
    assert plan_for(rows=640).evaluate_every_steps == 10
    assert plan_for(evaluate_every_steps=7).evaluate_every_steps == 7
    assert plan_for(evaluate_every_steps=7, max_steps=5).evaluate_every_steps == 5


def test_nothing_to_train_on_is_an_error_with_the_counts() -> None:
    """Zero rows are refused before any time is spent."""
    with pytest.raises(DataLoadingError, match="None of the 0 rows"):
        plan_for(rows=0)


def test_a_degraded_model_or_dataset_makes_the_plan_degraded() -> None:
    """What earlier stages had to give up on is carried along, once each."""
    config = TrainingConfig()
    plan = build_plan(
        config,
        environment(),
        snapshot(degraded=("quantization nf4",)),
        plan_adapter(config, QWEN3_4B),
        manifest(degraded=("sample data", "quantization nf4")),
    )
    assert plan.degraded == ("quantization nf4", "sample data")


@pytest.mark.parametrize("gpu_gb", [24.0, None])
def test_each_derived_value_has_its_reason(gpu_gb: float | None) -> None:
    """Everything that the config does not state literally is explained in a sentence."""
    plan = plan_for(TINY, gpu_gb=gpu_gb)
    derived = {"device", "places", "max_memory_gb", "gradient_accumulation_steps", "warmup_steps"}
    derived |= {"total_steps", "evaluate_every_steps", "predicted", *MemorySettings.model_fields}
    asked = set(TrainingConfig.model_fields)
    given_by_stages = {"attempt", "run_id", "run_dir", "model", "adapter", "dataset"}
    rest = {"resume_from", "degraded", "reasons"}
    rest |= {"format_version", "memory", "effective_batch_size", "places_per_host"}
    undecided = set(TrainPlan.model_fields) - asked - given_by_stages - rest
    assert undecided | set(MemorySettings.model_fields) <= derived
    assert set(plan.reasons) == derived
    assert all(reason.endswith(".") for reason in plan.reasons.values())
