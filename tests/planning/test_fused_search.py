"""Which settings of the fused path a plan takes: they fit, use the budget, and say why."""

from __future__ import annotations

from dataclasses import replace
from functools import cache
from itertools import pairwise
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from support.plans import QWEN3_14B, TINY, environment, hopper, plan_on, workload

from qwen3ft.config import TrainingConfig
from qwen3ft.errors import ConfigError, InsufficientMemoryError
from qwen3ft.planning.fit import choose
from qwen3ft.planning.footprint import predict_memory
from qwen3ft.planning.fused_settings import (
    HOST_SHARE,
    LOSS_CHUNKS_TOKENS,
    MLP_CHUNKS_TOKENS,
    combinations,
    host_bytes_needed,
    micro_batch_sizes,
)
from qwen3ft.planning.fused_sizes import FusedSizes
from qwen3ft.planning.gpu_specs import require_gpu_spec
from qwen3ft.planning.recompute import ON_DEVICE, Level, offload_evenly
from qwen3ft.planning.speed import ranking_seconds, typical_rows
from qwen3ft.planning.what_if import described_machine, shape_request
from qwen3ft.planning.workload import workload_of
from qwen3ft.records.machine import EnvironmentReport
from qwen3ft.records.plan import TrainPlan
from qwen3ft.units import GIB

BUDGETS_GB = (4.0, 6.0, 8.0, 13.0, 24.0, 80.0)
LENGTHS = (256, 2048, 32768)


@cache
def plan_or_none(
    budget_gb: float, tokens: int, recompute: str = "auto", host_gb: float = 64.0
) -> TrainPlan | None:
    """For the 4B shape on a large GPU, of which some is allowed."""
    wanted: Any = {"max_memory_gb": budget_gb, "gradient_checkpointing": recompute}
    try:
        return long_plan(hopper(host_gb=host_gb), tokens, **wanted)
    except InsufficientMemoryError:
        return None


def long_plan(here: EnvironmentReport, tokens: int, **wanted: Any) -> TrainPlan:
    """Of rows of up to `tokens`, which are allowed."""
    limit = max(tokens, 256)
    return plan_on(here, longest_tokens=tokens, max_sequence_length=limit, **wanted)


def sizes_of(plan: TrainPlan) -> FusedSizes:
    return FusedSizes(workload_of(plan))


def levels_of(plan: TrainPlan) -> tuple[Level, ...]:
    """What each block keeps of the largest row."""
    return sizes_of(plan).levels(workload_of(plan).tokens, plan.memory.activation_bytes)


def seconds_of(plan: TrainPlan) -> float:
    return ranking_seconds(workload_of(plan))


@pytest.mark.parametrize("tokens", LENGTHS)
def test_every_budget_is_kept_and_used(tokens: int) -> None:
    """The peak is within it, the effective batch exact, and more of it is never slower."""
    plans = [plan_or_none(budget, tokens) for budget in BUDGETS_GB]
    found = [plan for plan in plans if plan is not None]
    assert plans[-len(found) :] == found
    assert len(found) >= 5
    for plan in found:
        assert plan.memory.kernels == "fused"
        assert plan.memory.packing
        assert plan.effective_batch_size == 64
        assert plan.predicted_peak_bytes <= plan.max_memory_gb * GIB
        assert plan.memory.gradient_checkpointing == (set(levels_of(plan)) != {Level.KEEP_ALL})
        assert plan.memory.eval_batch_size * tokens <= max(
            tokens, workload_of(plan).capacity_tokens
        )
    seconds = [seconds_of(plan) for plan in found]
    assert seconds == sorted(seconds, reverse=True)
    assert seconds[-1] < seconds[0]
    tight = [
        p for p in found if p.memory.gradient_checkpointing and not p.memory.offload_activations
    ]
    assert all(plan.predicted_peak_bytes >= 0.99 * plan.max_memory_gb * GIB for plan in tight)


@pytest.mark.parametrize(("budget_gb", "tokens"), [(24.0, 256), (13.0, 2048), (80.0, 2048)])
def test_recomputing_as_asked(budget_gb: float, tokens: int) -> None:
    """'on': the least that a row can take; 'off': everything is kept, or it is refused."""
    plan = plan_or_none(budget_gb, tokens, "on")
    assert plan is not None
    assert plan.memory.gradient_checkpointing
    row = workload_of(plan).tokens
    least = sizes_of(plan).row_bytes(row, sizes_of(plan).levels(row, 0))
    assert plan.memory.activation_bytes == least
    kept = plan_or_none(budget_gb, tokens, "off")
    assert kept is not None
    assert not kept.memory.gradient_checkpointing
    assert not kept.memory.offload_activations
    assert set(levels_of(kept)) == {Level.KEEP_ALL}


@pytest.mark.parametrize(("budget_gb", "tokens"), [(6.0, 2048), (24.0, 32768)])
def test_everything_is_kept_or_the_plan_is_refused(budget_gb: float, tokens: int) -> None:
    """With 'off', where 'auto' finds a way."""
    assert plan_or_none(budget_gb, tokens) is not None
    assert plan_or_none(budget_gb, tokens, "off") is None


@pytest.mark.parametrize("host_gb", [0.5, 4.0, 64.0])
def test_host_memory_is_used_within_its_share(host_gb: float) -> None:
    """What waits there fits half of the machine's; where that is little, nothing waits."""
    plans = [plan_or_none(budget, 2048, host_gb=host_gb) for budget in (5.0, 6.0, 8.0)]
    found = [plan for plan in plans if plan is not None and plan.memory.kernels == "fused"]
    assert found
    for plan in found:
        waiting = host_bytes_needed(workload_of(plan))
        assert (waiting > 0) == plan.memory.offload_activations
        assert waiting <= HOST_SHARE * host_gb * GIB
    assert any(plan.memory.offload_activations for plan in found) == (host_gb > 1)


@pytest.mark.parametrize(
    ("tokens", "recompute", "host_gb", "budget_gb"),
    [
        (256, "auto", 64.0, 3.5),
        (2048, "auto", 64.0, 3.9),
        (32768, "auto", 0.0, 3.9),
        (2048, "off", 64.0, 3.9),
        (32768, "off", 0.0, 3.9),
    ],
)
def test_what_would_fit_does(tokens: int, recompute: str, host_gb: float, budget_gb: float) -> None:
    """The refusal lists every part, and names a budget and a length that then fit."""
    wanted: Any = {"gradient_checkpointing": recompute}
    with pytest.raises(InsufficientMemoryError) as caught:
        long_plan(hopper(host_gb=host_gb), tokens, max_memory_gb=budget_gb, **wanted)
    facts = caught.value.facts
    assert all(f"  {name}" in caught.value.what for name in facts["parts"])
    assert "in all" in caught.value.what
    need_gb = facts["would_fit"]["max_memory_gb"]
    assert sum(facts["parts"].values()) <= need_gb * GIB
    large = hopper(need_gb + 1, host_gb)
    fitting = long_plan(large, tokens, max_memory_gb=need_gb, **wanted)
    assert fitting.predicted_peak_bytes <= need_gb * GIB
    with pytest.raises(InsufficientMemoryError):
        long_plan(large, tokens, max_memory_gb=need_gb - 0.02, **wanted)
    if (shorter := facts["would_fit"].get("max_sequence_length")) is not None:
        here = hopper(host_gb=host_gb)
        assert long_plan(here, shorter, max_memory_gb=budget_gb, **wanted)


@pytest.mark.parametrize("now", [hopper(), environment()], ids=["fused", "plain"])
def test_the_same_request_gives_the_same_plan(now: EnvironmentReport) -> None:
    """The free memory of the moment does not matter."""
    wanted: Any = {"max_memory_gb": 24.0, "batch_size": 16, "gradient_accumulation_steps": 15}
    later = now.model_copy(update={"host_free_bytes": 5})
    plans = [long_plan(here, 2048, shape=QWEN3_14B, **wanted) for here in (now, later)]
    assert plans[0] == plans[1]
    assert plans[0].effective_batch_size == 240


@pytest.mark.parametrize(
    ("here", "wanted", "because"),
    [
        (hopper(None), {}, "No CUDA device"),
        (environment(80.0, capability="7.5", versions=("triton",)), {}, "has no bfloat16"),
        (environment(80.0, capability="9.0"), {}, "Triton is not installed"),
        (hopper(), {"lora_dropout": 0.1}, "lora_dropout is 0.1"),
        (hopper(), {"packing": "off"}, "packing is 'off'"),
        (hopper(), {"kernels": "plain"}, "Configured as 'plain'"),
    ],
)
def test_the_plain_path_is_taken_with_its_reason(
    here: EnvironmentReport, wanted: dict[str, Any], because: str
) -> None:
    """Where the fused one cannot run, or is not wanted; asked for there, it is refused."""
    plan = plan_on(here, TINY, **wanted)
    assert plan.memory.kernels == "plain"
    assert because in plan.reasons["kernels"]
    memory = plan.memory
    assert (memory.activation_bytes, memory.chunk_tokens, memory.head_groups) == (0, 0, 1)
    if here.gpus and "kernels" not in wanted:
        with pytest.raises(ConfigError, match="cannot run") as caught:
            plan_on(here, TINY, kernels="fused", **wanted)
        assert because in caught.value.why
        assert caught.value.next_command == "qwen3ft plan --set kernels=auto"


def test_on_a_cpu_the_fused_path_runs_if_it_is_asked_for() -> None:
    """With packed rows and without dropout; nothing waits in host memory there."""
    here = environment(None)
    plan = plan_on(here, TINY, kernels="fused", max_memory_gb=4.0)
    assert plan.memory.kernels == "fused"
    assert plan.memory.packing
    assert not plan.memory.offload_activations
    for wanted in ({"lora_dropout": 0.1}, {"packing": "off"}):
        with pytest.raises(ConfigError, match="cannot run"):
            plan_on(here, TINY, kernels="fused", **wanted)


@pytest.mark.parametrize("budget_gb", [6.0, 24.0, 80.0])
def test_each_derived_value_of_the_fused_path_has_its_reason(budget_gb: float) -> None:
    """The same ones as on the plain path, each a sentence."""
    plan = plan_or_none(budget_gb, 256)
    assert plan is not None
    assert plan.reasons.keys() == plan_on(hopper(), TINY, kernels="plain").reasons.keys()
    assert all(reason.endswith(".") for reason in plan.reasons.values())


@given(levels=st.lists(st.sampled_from(ON_DEVICE), max_size=60), count=st.integers(0, 60))
def test_blocks_sent_away_are_dropped_ones_evenly_spread(levels: list[Level], count: int) -> None:
    """As many as asked for and there are; the gaps between them differ by one at most."""
    sent = offload_evenly(tuple(levels), count)
    dropped = [index for index, level in enumerate(levels) if level == Level.RECOMPUTE_GATE_UP]
    changed = [index for index, level in enumerate(levels) if sent[index] != level]
    assert all(sent[index] == Level.OFFLOAD_GATE_UP for index in changed)
    assert set(changed) <= set(dropped)
    assert len(changed) == min(count, len(dropped))
    places = [dropped.index(index) for index in changed]
    gaps = {later - earlier for earlier, later in pairwise(places)}
    assert len(gaps) <= 1 or max(gaps) - min(gaps) == 1


@given(
    tokens=st.integers(1, 40_000),
    budgets=st.tuples(st.floats(0, 60), st.floats(0, 60)),
    groups=st.sampled_from([1, 2, 8]),
    chunk=st.sampled_from([2048, 16384]),
)
def test_a_row_takes_no_more_than_it_may(
    tokens: int, budgets: tuple[float, float], groups: int, chunk: int
) -> None:
    """If it can at all; no block could keep more, and more room never keeps less."""
    sizes = FusedSizes(workload(loss_chunk_tokens=1024, chunk_tokens=chunk, head_groups=groups))
    kept = []
    for budget in sorted(int(gb * GIB) for gb in budgets):
        levels = sizes.levels(tokens, budget)
        least = sizes.row_bytes(tokens, (Level.RECOMPUTE_ALL,) * 36)
        assert sizes.row_bytes(tokens, levels) <= max(budget, least)
        assert list(levels) == sorted(levels, reverse=True)
        coarsest = ON_DEVICE.index(levels[0])
        assert coarsest - ON_DEVICE.index(levels[-1]) <= 1
        if coarsest:
            richer = levels.count(levels[0]) - 1
            more = (levels[0],) * richer + (ON_DEVICE[coarsest - 1],) * (36 - richer)
            assert sizes.row_bytes(tokens, more) > budget
        kept.append(sum(sizes.kept_per_token()[level] for level in levels))
    assert kept[0] <= kept[1]


def test_nothing_is_computed_again_for_what_is_sent_away() -> None:
    """Room for what is on its way is taken only where that saves more than it costs."""
    for gigabytes in (6.0, 7.95, 9.0, 12.0):
        sizes = {
            away: FusedSizes(
                workload(loss_chunk_tokens=1024, chunk_tokens=16384, offloaded_mlp_blocks=away)
            )
            for away in (0, 10)
        }
        levels = {away: each.levels(7008, int(gigabytes * 2**30)) for away, each in sizes.items()}
        cost = {away: sizes[0].operations(7008, each, 0) for away, each in levels.items()}
        assert cost[10] <= cost[0]
        assert Level.OFFLOAD_GATE_UP not in levels[0]
        assert sizes[10].row_bytes(7008, levels[10]) <= gigabytes * 2**30


def test_held_out_rows_longer_than_any_trained_one_are_counted() -> None:
    """An evaluation of one such row takes more than a training that keeps everything."""
    plan = plan_on(hopper(), max_memory_gb=40.0, batch_size=2, gradient_accumulation_steps=1)
    work = workload_of(plan.with_settings(eval_batch_size=1))
    totals = []
    for tokens in (256, 131072):
        parts = predict_memory(replace(work, eval_tokens=tokens))
        totals.append(sum(part.bytes for part in parts))
    assert totals[1] > totals[0] + 3 * GIB


def test_ranks_share_the_memory_of_their_host_and_leave_room_for_nccl() -> None:
    """Two with 40 GB beside them send as little there as one with 20; CPUs need no NCCL."""
    machine = hopper(host_gb=40.0)
    second = machine.gpus[0].model_copy(update={"uuid": "GPU-1", "index": 1})
    both = machine.model_copy(update={"gpus": (*machine.gpus, second)})
    plans = [long_plan(both, 32768, max_memory_gb=24.0, gpus=count) for count in ("1", "2")]
    halved = long_plan(hopper(host_gb=20.0), 32768, max_memory_gb=24.0)
    assert plans[0].memory.offloaded_mlp_blocks > halved.memory.offloaded_mlp_blocks
    assert plans[1].memory.offloaded_mlp_blocks <= halved.memory.offloaded_mlp_blocks
    names = [{part.name for part in plan.predicted} for plan in plans]
    assert "NCCL" in names[1] - names[0]
    on_cpu = predict_memory(replace(workload_of(plans[1]), device="cpu"))
    assert {part.name for part in on_cpu}.isdisjoint({"NCCL"})


@pytest.mark.parametrize(
    ("gpu", "tokens", "sequences", "expected"),
    [
        ("NVIDIA H200", 256, 16, True),
        ("NVIDIA H200", 256, 64, False),
        ("NVIDIA H200", 32768, 16, False),
        ("NVIDIA GeForce RTX 4090", 256, 16, False),
    ],
)
def test_rows_that_take_longer_to_launch_than_to_compute_run_as_graphs(
    gpu: str, tokens: int, sequences: int, expected: bool
) -> None:
    """On a fast GPU a step of 16 short sequences does; of 64, or of long rows, none does."""
    here = hopper()
    here = here.model_copy(update={"gpus": (here.gpus[0].model_copy(update={"name": gpu}),)})
    asked: Any = {"batch_size": sequences, "gradient_accumulation_steps": 1}
    plan = long_plan(here, tokens, max_memory_gb=13.0, **asked)
    assert plan.memory.graphs is expected
    assert ("beside CUDA graphs" in {part.name for part in plan.predicted}) is expected
    assert plan.predicted_peak_bytes <= 13.0 * GIB
    on_cpu = replace(workload_of(plan), device="cpu")
    assert not any(
        each.memory.graphs
        for each in combinations(on_cpu, (sequences,), MLP_CHUNKS_TOKENS, LOSS_CHUNKS_TOKENS, (1,))
    )


def test_graphs_are_taken_in_more_rows_where_those_are_faster() -> None:
    """Of 64 rows of a small model what one row without graphs holds may take two with them."""
    asked = TrainingConfig(model_name="0.6b", batch_size=64, gradient_accumulation_steps=1)
    request = shape_request(asked, described_machine(require_gpu_spec("H200"), 1))
    for mean, rows in ((110, 1), (140, 2)):
        work = choose(replace(request, typical_tokens=mean)).work
        assert work.memory.graphs
        assert typical_rows(work)[0] == rows


@pytest.mark.parametrize("graphs", [False, True])
def test_every_sequence_of_a_row_is_padded_in_attentions_backward(graphs: bool) -> None:
    """By up to 128 tokens: more short sequences in as many tokens need more."""
    levers: Any = {"kernels": "fused", "packing": True, "graphs": graphs, "micro_batch_size": 64}
    few, many = (workload(step_sequences=count, **levers) for count in (32, 64))
    levels = (Level.RECOMPUTE_ALL,) * few.shape.num_hidden_layers
    bytes_of = [FusedSizes(each).row_bytes(2048, levels) for each in (few, many)]
    features = few.shape.query_features + few.shape.num_attention_heads
    sequences = 127 - 63 if graphs else 64 - 32
    assert bytes_of[1] - bytes_of[0] == 4 * 128 * sequences * features


def test_a_large_adapters_gradients_count_beside_graphs() -> None:
    """Those of a micro-batch come beside those of the step, outside the graphs' memory."""
    for rank in (8, 128):
        work = workload(rank=rank, kernels="fused", packing=True, graphs=True, chunk_tokens=4096)
        beside = FusedSizes(work).beside_graphs_bytes(work.tokens)
        assert beside >= 8 * work.adapter.trainable_parameters


def test_no_room_is_kept_for_rows_that_no_rank_gets() -> None:
    """Of 64 sequences each of two ranks gets 32, and each of three about 21: 32 hold them all."""
    one = hopper()
    two = one.model_copy(update={"gpus": (*one.gpus, *one.gpus)})
    asked: dict[str, Any] = {"batch_size": 64, "gradient_accumulation_steps": 1}
    plan = long_plan(two, 256, max_memory_gb=13.0, gpus="2", **asked)
    assert plan.memory.micro_batch_size <= 32
    assert [max(micro_batch_sizes(64, ranks)) for ranks in (1, 3, 4, 100)] == [64, 32, 16, 1]
