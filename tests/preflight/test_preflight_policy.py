"""What follows from a preflight, its report, and the cache of reports."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from support.preflights import BATCHES, out_of_memory, report_of

from qwen3ft.planning.plan import repredict
from qwen3ft.preflight import policy
from qwen3ft.preflight.cache import keep_report, read_report, report_key, report_path
from qwen3ft.preflight.report import GROUPS, preflight_markdown
from qwen3ft.preflight.stage import why_skipped
from qwen3ft.records.machine import GpuInfo
from qwen3ft.records.plan import TrainPlan
from qwen3ft.records.preflight import PreflightReport
from qwen3ft.units import GIB


@pytest.fixture
def lower(make_config: Any, environment: Any) -> Callable[[TrainPlan, PreflightReport], TrainPlan]:
    """Plan anew after a report, within the plan's budget."""

    def make(plan: TrainPlan, report: PreflightReport) -> TrainPlan:
        return policy.replan(
            make_config(max_memory_gb=plan.max_memory_gb), environment, plan, report
        )

    return make


def frugal(plan: TrainPlan) -> TrainPlan:
    """Return the plan with nothing left to lower."""
    least = {"micro_batch_size": 1, "loss_chunk_tokens": 128, "gradient_checkpointing": True}
    return repredict(plan.with_settings(**least))


@pytest.mark.parametrize(
    ("measured_share", "failure", "settings", "first", "second"),
    [
        (0.90, None, "", "train", "train"),
        (0.20, None, "lowest", "train", "train"),
        (1.00, None, "", "train", "train"),
        (1.05, None, "", "replan", "recover"),
        (1.05, None, "lowest", "stop", "stop"),
        (0.0, {"tried_gb": 0.5}, "", "replan", "recover"),
        (0.0, {"phase": "evaluate"}, "", "replan", "recover"),
        (0.0, {}, "lowest", "stop", "stop"),
        # With consent, the ladder of recovery has rungs that change the result.
        (0.0, {}, "lowest, degraded allowed", "recover", "recover"),
        (0.0, {"phase": "load"}, "", "stop", "stop"),
    ],
)
def test_what_fits_is_trained_and_what_does_not_is_planned_once_more(
    make_plan: Any,
    measured_share: float,
    failure: dict[str, Any] | None,
    settings: str,
    first: str,
    second: str,
) -> None:
    """A decision follows from the measurement, and from whether a new plan was made before."""
    plan = frugal(make_plan(eval_batch_size=1)) if "lowest" in settings else make_plan()
    error = None if failure is None else out_of_memory(**failure)
    report, allowed = report_of(plan, measured_share, error), "allowed" in settings
    assert policy.decide_preflight(plan, report, replanned=False, allow_degraded=allowed) == first
    assert policy.decide_preflight(plan, report, replanned=True, allow_degraded=allowed) == second


def test_host_memory_beside_a_gpu_is_answered_by_less_offloading(
    make_plan: Any, lower: Any
) -> None:
    """A smaller budget on the GPU would send more to the host; without offloading, it recovers."""
    plan = make_plan(device="cuda", offload_activations=True)
    report = report_of(plan, failure=out_of_memory(domain="host"))
    assert policy.decide_preflight(plan, report, replanned=False, allow_degraded=False) == "replan"
    assert not lower(plan, report).memory.offload_activations
    plan = make_plan(device="cuda")
    report = report_of(plan, failure=out_of_memory(domain="host"))
    assert policy.decide_preflight(plan, report, replanned=False, allow_degraded=False) == "recover"


@pytest.mark.parametrize("tried_gb", [0.0, 1.5])
def test_the_new_plan_asks_for_less_by_what_the_prediction_missed(
    make_plan: Any, lower: Any, tried_gb: float
) -> None:
    """Budget and effective batch stay, and its reason names the first plan's failure."""
    budget_gb = make_plan().predicted_peak_bytes / GIB * 1.001
    plan = make_plan(max_memory_gb=budget_gb)
    report = report_of(plan, failure=out_of_memory(tried_gb=tried_gb))
    corrected = policy.corrected_budget_gb(report)
    missed_gb = max(tried_gb, 0.1 * budget_gb)
    assert corrected == pytest.approx(plan.predicted_peak_bytes / GIB - missed_gb, abs=1e-6)
    made = lower(plan, report)
    assert made.max_memory_gb == budget_gb
    assert made.predicted_peak_bytes < plan.predicted_peak_bytes
    assert made.effective_batch_size == plan.effective_batch_size
    assert "ran out of memory" in made.reasons["max_memory_gb"]
    assert all(reason.endswith(".") for reason in made.reasons.values())


def test_an_evaluation_that_does_not_fit_costs_training_nothing(make_plan: Any, lower: Any) -> None:
    """Only its batch is halved."""
    plan = make_plan(eval_batch_size=8)
    made = lower(plan, report_of(plan, failure=out_of_memory(phase="evaluate")))
    assert made.memory.eval_batch_size == 4
    assert made.memory.micro_batch_size == plan.memory.micro_batch_size


def test_too_little_memory_is_reported_part_by_part(make_plan: Any) -> None:
    """The error has both numbers, the parts, and one next command."""
    plan = frugal(make_plan(device="cuda"))
    error = policy.too_little_memory(report_of(plan, 1.2))
    assert "4.80 GB were measured, the budget is 4.00 GB" in error.what
    assert "weights" in error.what
    assert error.next_command == "qwen3ft plan --set max_memory_gb=5.0"
    load = report_of(plan, failure=out_of_memory(phase="load"))
    assert "while the model was loaded" in policy.too_little_memory(load).what


# --- the report ---


def test_parts_measured_on_a_gpu_add_up_to_the_peak(make_plan: Any) -> None:
    """Weights and state are what stays; activations are the rest of what tensors took."""
    report = report_of(make_plan(device="cuda"), 0.5)
    measured = {part.name: part.measured_bytes for part in report.parts}
    assert measured["weights"] == 1_000
    assert measured["adapter, gradients, optimizer"] == 400
    assert sum(size for size in measured.values() if size is not None) == report.measured_bytes
    assert sum(part.predicted_bytes for part in report.parts) == report.predicted_bytes
    assert report.relative_error == report.predicted_bytes / report.measured_bytes - 1


def test_what_graphs_hold_is_left_open(make_plan: Any) -> None:
    """Their pool is neither free nor in use, so only weights and context can be told apart."""
    report = report_of(make_plan(device="cuda", graphs=True), 0.5)
    measured = {part.name for part in report.parts if part.measured_bytes is not None}
    assert measured == {"weights", "context and libraries"}


def test_parts_of_resident_memory_that_cannot_be_told_apart_are_left_open(make_plan: Any) -> None:
    """On a CPU, libraries and weights are known, and the rest is not guessed."""
    report = report_of(make_plan(), 0.5)
    known = {part.name for part in report.parts if part.measured_bytes is not None}
    assert known == {"weights", "context and libraries"}


@pytest.mark.parametrize("kernels", ["plain", "fused"])
def test_every_named_part_of_a_prediction_is_grouped(make_plan: Any, kernels: str) -> None:
    """A part that was renamed would silently count as activations."""
    changes = {"kernels": kernels, "packing": kernels == "fused", "chunk_tokens": 1024}
    plan = repredict(make_plan(device="cuda", places=(0, 1), activation_bytes=GIB, **changes))
    assert GROUPS.keys() <= {part.name for part in plan.predicted}


def test_a_report_notes_a_wrong_prediction_and_a_budget_left_unused(make_plan: Any) -> None:
    """What fits is trained as it was planned all the same."""
    plan = make_plan(gradient_checkpointing=True)
    (off, unused) = report_of(plan, 0.5).notes
    assert "off by" in off
    assert "2.00 GB of the budget stay unused" in unused
    assert "recomputes" in unused
    whole = make_plan(gradient_checkpointing=False, effective_batch_size=16)
    assert len(report_of(whole, 0.5).notes) == 1


def test_the_page_shows_predicted_beside_measured(make_plan: Any) -> None:
    """The last measurement stands first."""
    plan = make_plan()
    text = preflight_markdown([report_of(plan, failure=out_of_memory()), report_of(plan, 0.5)])
    fits, fails = text.index("# Preflight: fits"), text.index("# Preflight: does not fit")
    assert fits < fails
    assert "2.00 of 4.00 GB measured" in text
    assert "| weights |" in text
    assert "| micro-batch | most tokens | 2 | 18 | 9 |" in text


# --- whether, and the cache ---


def test_on_a_cpu_only_a_plan_near_its_budget_is_measured(make_plan: Any, make_config: Any) -> None:
    """A worker's start takes longer than the embedded model needs."""
    plan = make_plan()
    assert "far from" in why_skipped(make_config(), plan)
    near = plan.model_copy(update={"max_memory_gb": 1.9 * plan.predicted_peak_bytes / GIB})
    assert why_skipped(make_config(), near) == ""
    assert why_skipped(make_config(), make_plan(device="cuda")) == ""
    assert why_skipped(make_config(preflight="on"), plan) == ""
    assert "off" in why_skipped(make_config(preflight="off"), make_plan(device="cuda"))


def test_what_changes_memory_changes_the_key_and_nothing_else_does(
    make_plan: Any, environment: Any
) -> None:
    """Levers, lengths, GPU, driver and libraries count; the learning rate and the run do not."""
    plan = make_plan()
    values = {"index": 0, "name": "a GPU", "uuid": "GPU-1", "total_bytes": 9, "free_bytes": 5}
    gpu = GpuInfo(**values, driver_version="1")

    def key(changes: Any = (), batches: Any = BATCHES, **settings: Any) -> str:
        there = environment.model_copy(update={"gpus": (gpu,), **dict(changes)})
        return report_key(plan.with_settings(**settings), there, batches)

    longer = BATCHES.train[0].model_copy(update={"lengths": (9, 8)})
    same = [
        key(),
        key(learning_rate=1.0, run_id="other", reasons={}),
        key({"gpus": (gpu.model_copy(update={"free_bytes": 4}),)}),
    ]
    others = [
        key(micro_batch_size=1),
        key(max_memory_gb=3.0),
        key(activation_bytes=7),
        key(predicted=plan.predicted[1:]),
        key(adapter=plan.adapter.model_copy(update={"r": 4})),
        key({"gpus": (gpu.model_copy(update={"driver_version": "2"}),)}),
        key({"versions": {"torch": "3"}}),
        key(batches=BATCHES.model_copy(update={"train": (longer,)})),
    ]
    assert len(set(same)) == 1
    assert len({*same, *others}) == 1 + len(others)


def test_a_report_is_kept_unless_others_held_the_memory(
    make_plan: Any, make_config: Any, environment: Any, tmp_path: Path
) -> None:
    """It comes back as it was written; a damaged file counts as none."""
    config, plan = make_config(cache_dir=str(tmp_path)), make_plan()
    assert read_report(config, "key") is None
    crowded = environment.model_copy(update={"host_free_bytes": GIB})
    keep_report(config, crowded, report_of(plan, failure=out_of_memory()))
    assert read_report(config, "key") is None
    report = report_of(plan, 0.5)
    keep_report(config, crowded, report)
    kept = read_report(config, "key")
    assert kept.from_cache
    assert kept.model_copy(update={"from_cache": False}) == report
    report_path(config, "key").write_text('{"device": "card"')
    assert read_report(config, "key") is None
