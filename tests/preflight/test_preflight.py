"""The preflight: the worst batches of a run, measured in a worker, and what follows from it."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest

from qwen3ft.config import TrainingConfig
from qwen3ft.errors import ConfigError, InsufficientMemoryError, OutOfMemoryError
from qwen3ft.jobs.folders import RunDir
from qwen3ft.model.adapter import plan_adapter
from qwen3ft.planning.packing import row_tokens
from qwen3ft.planning.plan import build_plan, repredict
from qwen3ft.preflight import worst_batches as preflight_batches
from qwen3ft.preflight.cache import keep_report, read_report, report_key, report_path
from qwen3ft.preflight.policy import (
    corrected_budget_gb,
    decide_preflight,
    replan,
    too_little_memory,
)
from qwen3ft.preflight.report import (
    GROUPS,
    measured_report,
    out_of_memory_report,
    preflight_markdown,
)
from qwen3ft.preflight.stage import measure_first, shortened, why_skipped
from qwen3ft.preflight.worst_batches import find_worst, read_lengths
from qwen3ft.records.machine import GpuInfo
from qwen3ft.records.plan import TrainPlan
from qwen3ft.records.preflight import (
    Measurement,
    PhaseMemory,
    PreflightReport,
    PreflightResult,
    WorstBatch,
    WorstBatches,
)
from qwen3ft.records.training import Failure
from qwen3ft.training import faults
from qwen3ft.training.batches import EffectiveBatchOrder, step_sampler
from qwen3ft.units import GIB

BATCHES = WorstBatches(
    train=(WorstBatch(chosen_for=("most tokens",), rows=(3, 1), lengths=(9, 7), slots=18),),
    evaluate=(WorstBatch(chosen_for=("most tokens",), rows=(0,), lengths=(5,), slots=5),),
    accumulates=True,
    steps_looked_at=4,
)


@pytest.fixture
def four(make_plan: Any) -> Callable[..., TrainPlan]:
    """A plan of micro-batches of four rows, four of them a step, over rows of up to 100 tokens."""

    def make(**changes: Any) -> TrainPlan:
        plan = make_plan()
        summary = plan.dataset.train.model_copy(update={"longest_tokens": 100})
        dataset = plan.dataset.model_copy(update={"train": summary})
        values = {"micro_batch_size": 4, "dataset": dataset, "eval_batch_size": 5}
        return plan.with_settings(**{**values, **changes})

    return make


# --- which batches ---


@pytest.mark.parametrize("packing", [False, True])
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_the_worst_micro_batch_is_the_worst_of_every_step_of_two_epochs(
    four: Any, packing: bool, seed: int
) -> None:
    """By brute force over what the sampler hands to the trainer."""
    lengths = np.random.default_rng(seed).integers(3, 101, 150)
    plan = four(packing=packing, seed=seed, total_steps=20)  # 10 steps an epoch
    order = EffectiveBatchOrder(lengths, plan.effective_batch_size, plan.seed)
    every: list[list[int]] = []
    for epoch in (0, 1):
        order.epoch = epoch
        every += [rows for step in step_sampler(order, plan) for rows in step]
    worst = find_worst(plan, lengths, lengths[:12])
    assert worst.steps_looked_at == 20
    slots = [_slots(lengths[rows], packing) for rows in every]
    by_name = {name: batch for batch in worst.train for name in batch.chosen_for}
    most, longest = by_name["most tokens"], by_name["longest row"]
    assert most.slots == max(slots)
    assert list(most.rows) in every
    assert max(longest.lengths) == lengths.max()
    with_longest = [
        size
        for size, rows in zip(slots, every, strict=True)
        if lengths[rows].max() == lengths.max()
    ]
    assert longest.slots == max(with_longest)
    assert all(list(batch.rows) in every for batch in worst.train)


def test_a_second_epoch_can_hold_the_worst_micro_batch(four: Any) -> None:
    """The order differs from epoch to epoch, so looking at the first alone would miss it."""
    later = 0
    for seed in range(12):
        lengths = np.random.default_rng(seed).integers(3, 60, 150)
        one, two = (
            find_worst(four(packing=True, total_steps=steps, seed=seed), lengths, lengths)
            for steps in (10, 20)
        )
        assert one.train[0].slots <= two.train[0].slots
        later += one.train[0].slots < two.train[0].slots
    assert later > 0


def test_a_fused_plan_also_runs_the_row_that_keeps_most(four: Any) -> None:
    """Fused rows keep as much as fits: one smaller than the largest may take more."""
    from qwen3ft.planning.fused_sizes import FusedSizes
    from qwen3ft.planning.workload import workload_of

    plan = four(kernels="fused", packing=True, chunk_tokens=1024, total_steps=40)
    sizes = FusedSizes(workload_of(plan))
    room = sizes.row_bytes(288, sizes.levels(288, 2**40))  # all of 288 tokens, not of 400
    plan = plan.with_settings(activation_bytes=room)
    lengths = np.random.default_rng(7).integers(40, 101, 150)
    worst = find_worst(plan, lengths, lengths)
    kept = next(batch for batch in worst.train if "most kept of its blocks" in batch.chosen_for)
    most = next(batch for batch in worst.train if "most tokens" in batch.chosen_for)
    assert kept.slots < most.slots
    of = {
        batch: sizes.row_bytes(batch.slots, sizes.levels(batch.slots, room))
        for batch in worst.train
    }
    assert of[kept] == max(of.values())


def test_the_worst_evaluation_batch_is_one_of_consecutive_rows(four: Any) -> None:
    """Padded to its longest row, and a shorter last batch stands last."""
    dev = np.array([9, 9, 9, 9, 9, 2, 2, 2, 2, 2, 60, 3])
    worst = find_worst(four(eval_batch_size=5), np.array([5] * 16), dev)
    most = {name: batch for batch in worst.evaluate for name in batch.chosen_for}
    assert most["most tokens"].slots == 120  # two rows, padded to 60
    assert most["most tokens"].rows == (10, 11)
    assert len(worst.evaluate[-1].rows) == 2
    assert find_worst(four(), np.array([5] * 16), np.array([], int)).evaluate == ()


def test_every_batch_runs_with_gradients_and_with_the_optimizers_state() -> None:
    """One micro-batch is run twice a step where steps have several, and every step twice."""
    assert BATCHES.steps() == (((3, 1), (3, 1)),) * 2
    other = BATCHES.train[0].model_copy(update={"rows": (8,)})
    both = BATCHES.model_copy(update={"train": (*BATCHES.train, other)})
    assert both.steps() == (((3, 1), (8,)),) * 2
    alone = both.model_copy(update={"accumulates": False})
    assert alone.steps() == (((3, 1),), ((8,),)) * 2


def test_long_runs_are_looked_at_up_to_a_limit(four: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """The limit is in sequences; a step is looked at in any case."""
    lengths = np.full(160, 10)
    monkeypatch.setattr(preflight_batches, "MOST_SEQUENCES", 64)
    assert find_worst(four(total_steps=500), lengths, lengths).steps_looked_at == 4
    monkeypatch.setattr(preflight_batches, "MOST_SEQUENCES", 1)
    assert find_worst(four(total_steps=500), lengths, lengths).steps_looked_at == 1


def test_lengths_are_read_without_the_rows(make_plan: Any, manifest: Any) -> None:
    """As many as there are rows, and their sum is the manifest's number of tokens."""
    train, dev = read_lengths(make_plan())
    assert (len(train), int(train.sum())) == (manifest.train.rows, manifest.train.tokens)
    assert (len(dev), int(dev.sum())) == (manifest.dev.rows, manifest.dev.tokens)


def _slots(tokens: Any, packed: bool) -> int:
    return row_tokens(int(tokens.sum())) if packed else len(tokens) * int(tokens.max())


# --- what follows ---


def report_of(
    plan: TrainPlan, measured_share: float = 0.9, failure: OutOfMemoryError | None = None
) -> PreflightReport:
    """A report in which the process took a share of the budget, or ran out of memory."""
    if failure is not None:
        return out_of_memory_report("key", plan, BATCHES, failure, (), 3.0)
    peak = round(measured_share * plan.max_memory_gb * GIB)
    phases = tuple(
        PhaseMemory(
            phase=name,
            allocated_bytes=peak - 900,
            reserved_bytes=peak - 500,
            process_bytes=peak,
            resting_bytes=resting,
            seconds=1.0,
        )
        for name, resting in (("load", 1_100), ("forward_backward", 1_400))
    )
    measurement = Measurement(
        device="card", before_bytes=10, adapter_bytes=100, phases=phases, seconds=2.0
    )
    return measured_report("key", plan, BATCHES, measurement)


def out_of_memory(**facts: Any) -> OutOfMemoryError:
    return OutOfMemoryError("CUDA out of memory.", **{"phase": "train", **facts})


def frugal(plan: TrainPlan) -> TrainPlan:
    """Nothing left to lower."""
    least = {"micro_batch_size": 1, "loss_chunk_tokens": 128, "gradient_checkpointing": True}
    return repredict(plan.with_settings(**least))


@pytest.mark.parametrize(
    ("measured_share", "failure", "lowest", "first", "second"),
    [
        (0.90, None, False, "train", "train"),
        (0.20, None, True, "train", "train"),
        (1.00, None, False, "train", "train"),
        (1.05, None, False, "replan", "recover"),
        (1.05, None, True, "stop", "stop"),
        (0.0, {"tried_gb": 0.5}, False, "replan", "recover"),
        (0.0, {"phase": "evaluate"}, False, "replan", "recover"),
        (0.0, {}, True, "stop", "stop"),
        (0.0, {"phase": "load"}, False, "stop", "stop"),
    ],
)
def test_what_fits_is_trained_and_what_does_not_is_planned_once_more(
    make_plan: Any,
    measured_share: float,
    failure: dict[str, Any] | None,
    lowest: bool,
    first: str,
    second: str,
) -> None:
    """The table of the policy, before and after a new plan was made."""
    plan = frugal(make_plan(eval_batch_size=1)) if lowest else make_plan()
    error = None if failure is None else out_of_memory(**failure)
    report = report_of(plan, measured_share, error)
    decisions = [
        decide_preflight(plan, report, replanned=replanned, allow_degraded=False)
        for replanned in (False, True)
    ]
    assert decisions == [first, second]


def test_recovery_may_still_change_the_result_where_that_is_allowed(make_plan: Any) -> None:
    """With consent the ladder has rungs beyond those that keep the result: it is left to it."""
    plan = frugal(make_plan(eval_batch_size=1))
    report = report_of(plan, failure=out_of_memory())
    for replanned in (False, True):
        assert decide_preflight(plan, report, replanned=replanned, allow_degraded=True) == "recover"


def test_host_memory_beside_a_gpu_is_answered_by_less_offloading(
    make_plan: Any, make_config: Any, environment: Any
) -> None:
    """A smaller budget on the GPU would send more to the host; with nothing there: recovery."""
    plan = make_plan(device="cuda", offload_activations=True)
    report = report_of(plan, failure=out_of_memory(domain="host"))
    assert decide_preflight(plan, report, replanned=False, allow_degraded=False) == "replan"
    assert not replan(make_config(), environment, plan, report).memory.offload_activations
    plan = make_plan(device="cuda")
    report = report_of(plan, failure=out_of_memory(domain="host"))
    assert decide_preflight(plan, report, replanned=False, allow_degraded=False) == "recover"


@pytest.mark.parametrize("tried_gb", [0.0, 1.5])
def test_the_new_plan_asks_for_less_by_what_the_prediction_missed(
    make_plan: Any, make_config: Any, environment: Any, tried_gb: float
) -> None:
    """Within the same budget and with the same effective batch; its reason tells of the first."""
    budget_gb = make_plan().predicted_peak_bytes / GIB * 1.001
    plan = make_plan(max_memory_gb=budget_gb)
    report = report_of(plan, failure=out_of_memory(tried_gb=tried_gb))
    corrected = corrected_budget_gb(report)
    missed_gb = max(tried_gb, 0.1 * budget_gb)
    assert corrected == pytest.approx(plan.predicted_peak_bytes / GIB - missed_gb, abs=1e-6)
    lower = replan(make_config(max_memory_gb=budget_gb), environment, plan, report)
    assert lower.max_memory_gb == budget_gb
    assert lower.predicted_peak_bytes < plan.predicted_peak_bytes
    assert lower.effective_batch_size == plan.effective_batch_size
    assert "ran out of memory" in lower.reasons["max_memory_gb"]
    assert all(reason.endswith(".") for reason in lower.reasons.values())


def test_an_evaluation_that_does_not_fit_costs_training_nothing(
    make_plan: Any, make_config: Any, environment: Any
) -> None:
    """Only its batch is halved."""
    plan = make_plan(eval_batch_size=8)
    report = report_of(plan, failure=out_of_memory(phase="evaluate"))
    lower = replan(make_config(), environment, plan, report)
    assert lower.memory.eval_batch_size == 4
    assert lower.memory.micro_batch_size == plan.memory.micro_batch_size


def test_too_little_memory_is_told_part_by_part(make_plan: Any) -> None:
    """The error has both numbers, the parts, and one next command."""
    plan = frugal(make_plan(device="cuda"))
    error = too_little_memory(report_of(plan, 1.2))
    assert isinstance(error, InsufficientMemoryError)
    assert "4.80 GB were measured, the budget is 4.00 GB" in error.what
    assert "weights" in error.what
    assert error.next_command == "qwen3ft plan --set max_memory_gb=5.0"
    load = report_of(plan, failure=out_of_memory(phase="load"))
    assert "while the model was loaded" in too_little_memory(load).what


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


def test_parts_of_resident_memory_that_cannot_be_told_apart_are_left_open(make_plan: Any) -> None:
    """On a CPU: the libraries, the weights, and no guess of the rest."""
    report = report_of(make_plan(), 0.5)
    known = {part.name for part in report.parts if part.measured_bytes is not None}
    assert known == {"weights", "context and libraries"}


@pytest.mark.parametrize("kernels", ["plain", "fused"])
def test_every_named_part_of_a_prediction_is_grouped(make_plan: Any, kernels: str) -> None:
    """A part that was renamed would silently count as activations."""
    changes = {"kernels": kernels, "packing": kernels == "fused", "chunk_tokens": 1024}
    plan = repredict(make_plan(device="cuda", activation_bytes=GIB, **changes))
    assert GROUPS.keys() <= {part.name for part in plan.predicted}


def test_a_report_notes_a_wrong_prediction_and_a_budget_left_unused(make_plan: Any) -> None:
    """Notes only: what fits is trained as it was planned."""
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
    """Levers, lengths, card, driver and libraries count; the learning rate and the run do not."""
    plan = make_plan()
    gpu = {"index": 0, "name": "card", "uuid": "GPU-1", "total_bytes": 9, "free_bytes": 5}
    card = GpuInfo(**gpu, driver_version="1")

    def key(changes: Any = (), batches: Any = BATCHES, **settings: Any) -> str:
        there = environment.model_copy(update={"gpus": (card,), **dict(changes)})
        return report_key(plan.with_settings(**settings), there, batches)

    longer = BATCHES.train[0].model_copy(update={"lengths": (9, 8)})
    same = [
        key(),
        key(learning_rate=1.0, run_id="other", reasons={}),
        key({"gpus": (card.model_copy(update={"free_bytes": 4}),)}),
    ]
    others = [
        key(micro_batch_size=1),
        key(max_memory_gb=3.0),
        key(activation_bytes=7),
        key(predicted=plan.predicted[1:]),
        key(adapter=plan.adapter.model_copy(update={"r": 4})),
        key({"gpus": (card.model_copy(update={"driver_version": "2"}),)}),
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
    assert kept is not None
    assert kept.from_cache
    assert kept.model_copy(update={"from_cache": False}) == report
    report_path(config, "key").write_text('{"device": "card"')
    assert read_report(config, "key") is None


# --- with real workers ---


class Counted(NamedTuple):
    """What a preflight came to, and the workers that it started."""

    config: TrainingConfig
    plan: TrainPlan
    result: PreflightResult
    run: RunDir
    workers: list[str]


@pytest.fixture(scope="module")
def replanned(
    make_config: Any,
    environment: Any,
    snapshot: Any,
    manifest: Any,
    tmp_path_factory: pytest.TempPathFactory,
) -> Counted:
    """A preflight whose first measurement runs out of memory."""
    folder = tmp_path_factory.mktemp("preflight")
    config = make_config(cache_dir=str(folder / "cache"), preflight="on")
    adapter = plan_adapter(config, snapshot.shape)
    plan = build_plan(config, environment, snapshot, adapter, manifest)
    run, started = RunDir(folder / "run"), []
    with pytest.MonkeyPatch.context() as patch:
        count_workers(patch, started)
        patch.setenv(faults.VARIABLE, "oom@step=1:preflight=1")
        result = measure_first(config, environment, plan, run)
        return Counted(config, plan, result, run, started)


def count_workers(patch: pytest.MonkeyPatch, started: list[str]) -> None:
    """Note the kinds of the workers that a preflight starts; they run all the same."""
    from qwen3ft.jobs.launcher import run_worker
    from qwen3ft.preflight import stage as preflight

    def counting(kind: str, *arguments: Any, **named: Any) -> Any:
        started.append(kind)
        return run_worker(kind, *arguments, **named)

    patch.setattr(preflight, "run_worker", counting)


def test_memory_that_ran_out_leads_to_exactly_one_new_plan(replanned: Counted) -> None:
    """The new plan asks for less, keeps budget and batch, and is measured too: it fits."""
    first, second = replanned.result.reports
    assert replanned.workers == ["preflight", "preflight"]
    assert first.failure is not None
    assert first.failure.kind == "OutOfMemoryError"
    assert [phase.phase for phase in first.phases] == ["load", "evaluate"]
    assert (first.fitted, second.fitted) == (False, True)
    plan = replanned.result.plan
    assert plan.predicted_peak_bytes < replanned.plan.predicted_peak_bytes
    assert plan.max_memory_gb == replanned.plan.max_memory_gb
    assert plan.effective_batch_size == replanned.plan.effective_batch_size
    assert "The preflight measured" in plan.reasons["predicted"]


def test_a_preflight_measures_every_phase_and_leaves_nothing_behind(replanned: Counted) -> None:
    """No checkpoint, no attempt; what ran are the steps that were asked for."""
    report = replanned.result.reports[-1]
    phases = ["load", "forward_backward", "optimizer", "evaluate", "save"]
    assert [phase.phase for phase in report.phases] == phases
    assert all(0.1 * GIB < phase.process_bytes < 4 * GIB for phase in report.phases)
    assert report.measured_bytes == max(phase.process_bytes for phase in report.phases)
    assert all(phase.seconds > 0 for phase in report.phases)
    assert not list(replanned.run.path.rglob("*.safetensors"))
    assert replanned.run.attempts() == []
    lines = replanned.run.job("preflight-2").metrics.read_text().splitlines()
    trained = [line for line in map(json.loads, lines) if line["loss"] is not None]
    assert len(trained) == len(report.batches.steps())


def test_a_plan_that_was_measured_before_starts_no_worker(
    replanned: Counted, environment: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The same reports lead to the same plan."""
    started: list[str] = []
    count_workers(monkeypatch, started)
    monkeypatch.setenv(faults.VARIABLE, "oom@step=1:preflight=1")  # a part of the key
    again = measure_first(replanned.config, environment, replanned.plan, RunDir(tmp_path))
    assert started == []
    assert [report.from_cache for report in again.reports] == [True, True]
    assert again.plan == replanned.result.plan


def test_a_second_failure_is_left_to_recovery_or_ends_the_run(
    make_plan: Any, make_config: Any, environment: Any, tmp_path: Path
) -> None:
    """Never a third plan: with consent the ladder has rungs left, without it nothing is."""
    plan, run = make_plan(), RunDir(tmp_path / "run")
    settings = {"cache_dir": str(tmp_path / "cache"), "preflight": "on"}
    config = make_config(**settings)
    lengths = read_lengths(plan)
    first = plan
    for _ in range(2):
        key = report_key(plan, environment, find_worst(plan, *lengths))
        report = report_of(plan, failure=out_of_memory()).model_copy(update={"key": key})
        keep_report(config, environment, report)
        if plan is first:
            plan = replan(config, environment, plan, report)
    with pytest.raises(InsufficientMemoryError, match="nothing is left to lower"):
        measure_first(config, environment, first, run)
    result = measure_first(make_config(**settings, allow_degraded=True), environment, first, run)
    assert [report.from_cache for report in result.reports] == [True, True]
    assert result.plan.predicted == plan.predicted


def test_a_worker_that_fails_otherwise_costs_the_run_nothing(
    make_plan: Any,
    make_config: Any,
    environment: Any,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Killed: no report, nothing kept, the plan as it was. A bad request is told."""
    config = make_config(cache_dir=str(tmp_path / "cache"), preflight="on")
    plan, run = make_plan(), RunDir(tmp_path / "run")
    monkeypatch.setenv(faults.VARIABLE, "kill@step=1:preflight=1")
    result = measure_first(config, environment, plan, run)
    assert (result.plan, result.reports) == (plan, ())
    assert result.skipped
    assert not (tmp_path / "cache").exists()
    monkeypatch.setenv(faults.VARIABLE, "kil@step=1")
    with pytest.raises(ConfigError):
        measure_first(config, environment, plan, run)


def test_what_a_preflight_trains_is_a_part_of_the_plan(make_plan: Any) -> None:
    """Only the schedule is another: these steps, an evaluation and a checkpoint at their end."""
    plan = make_plan(resume_from="somewhere", warmup_steps=7)
    short = shortened(plan, BATCHES, RunDir(Path("run")))
    changed = {
        name for name in TrainPlan.model_fields if getattr(short, name) != getattr(plan, name)
    }
    assert (short.total_steps, short.evaluate_every_steps, short.resume_from) == (2, 2, None)
    assert changed <= {
        *("total_steps", "evaluate_every_steps", "warmup_steps"),
        *("resume_from", "run_id", "run_dir"),
    }
    assert Failure.from_error(out_of_memory()).kind == "OutOfMemoryError"
