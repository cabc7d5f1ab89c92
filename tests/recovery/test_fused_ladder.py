"""The levers against memory of the fused path: they keep the result, take less, and end."""

from __future__ import annotations

from typing import Any

import pytest
from support.plans import QWEN3_4B, hopper, plan_on

from qwen3ft.planning.plan import repredict
from qwen3ft.records.plan import TrainPlan
from qwen3ft.recovery.ladder import next_rungs, without_host_memory


def fused_plan(sequence_tokens: int = 256, **wanted: Any) -> TrainPlan:
    lengths = {"longest_tokens": sequence_tokens, "max_sequence_length": sequence_tokens}
    plan = plan_on(hopper(host_gb=128.0), max_memory_gb=13.0, **lengths, **wanted)
    assert plan.memory.kernels == "fused"
    return plan


@pytest.mark.parametrize("tokens", [256, 4096])
def test_each_rung_takes_less_and_keeps_the_effective_batch(tokens: int) -> None:
    """From the fastest plan down to one row at a time, in parts, waiting in host memory."""
    plan = fused_plan(tokens)
    before = plan
    for rung in next_rungs(plan, "train", allow_degraded=False):
        assert rung.keeps_result
        now = repredict(before.with_settings(**rung.values))
        assert now.predicted_peak_bytes <= before.predicted_peak_bytes
        assert now.effective_batch_size == plan.effective_batch_size
        before = now
    assert before.memory.micro_batch_size == 1
    assert before.memory.offload_activations
    assert before.memory.head_groups == QWEN3_4B.num_key_value_heads
    assert before.predicted_peak_bytes < 0.6 * plan.predicted_peak_bytes


def test_first_each_row_keeps_less() -> None:
    """Computing again costs less than another micro-batch, and no row needs all it may take."""
    plan = fused_plan()
    first = next_rungs(plan, "train", allow_degraded=False)[0]
    assert set(first.values) == {"activation_bytes", "gradient_checkpointing"}
    assert first.values["activation_bytes"] == int(0.75 * plan.memory.activation_bytes)
    lower = repredict(plan.with_settings(**first.values))
    assert lower.predicted_peak_bytes < plan.predicted_peak_bytes - 2**31


def test_graphs_are_given_up_before_anything_waits_in_host_memory() -> None:
    """They hold the memory of rows, and copies to the host have a stream that no graph has."""
    plan = fused_plan(batch_size=16, gradient_accumulation_steps=1)
    assert plan.memory.graphs
    without = []
    for rung in next_rungs(plan, "train", allow_degraded=False):
        plan, before = repredict(plan.with_settings(**rung.values)), plan
        if "graphs" in rung.values:
            assert plan.predicted_peak_bytes < before.predicted_peak_bytes - 2**28
            without.append(rung)
        assert not (plan.memory.graphs and plan.memory.offload_activations)
    assert len(without) == 1


def test_with_consent_rows_are_shortened_at_last() -> None:
    """After every lever that keeps the result."""
    rungs = next_rungs(fused_plan(), "train", allow_degraded=True)
    changing = [rung for rung in rungs if not rung.keeps_result]
    assert changing == rungs[-len(changing) :]
    assert "max_sequence_length" in changing[0].values


def test_where_the_host_runs_out_less_waits_there() -> None:
    """Attention's output first, then everything, as far as the GPU has room; then nothing."""
    plan = fused_plan(32768, batch_size=1, gradient_accumulation_steps=1)
    both = {"offload_activations": True, "offload_attention": True, "offloaded_mlp_blocks": 0}
    plan = repredict(plan.with_settings(**both))
    first = without_host_memory(plan)
    assert first is not None
    lower = repredict(plan.with_settings(**first.values))
    assert not lower.memory.offload_attention
    assert lower.memory.offload_activations
    second = without_host_memory(lower)
    assert second is not None
    last = repredict(lower.with_settings(**second.values))
    assert not last.memory.offload_activations
    assert last.predicted_peak_bytes <= 13 * 2**30
    assert without_host_memory(last.with_settings(offloaded_mlp_blocks=0)) is None


def test_a_sequence_that_needs_the_host_is_not_moved_to_a_gpu_without_room() -> None:
    """131,072 tokens cannot keep their blocks' inputs within 13 GB."""
    plan = fused_plan(131072, batch_size=1, gradient_accumulation_steps=1)
    assert plan.memory.offload_activations
    assert not plan.memory.offload_attention
    assert without_host_memory(plan) is None


def test_blocks_sent_away_stay_first() -> None:
    """What would be computed again waits in host memory only as long as the host has room."""
    plan = fused_plan()
    assert plan.memory.offloaded_mlp_blocks
    step = without_host_memory(plan)
    assert step is not None
    assert step.values == {"offloaded_mlp_blocks": 0}
