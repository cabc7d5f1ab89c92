"""The preflight with real workers: measured once, planned once more, and nothing left behind."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any, NamedTuple
from unittest.mock import Mock

import pytest
from support.preflights import BATCHES, out_of_memory, report_of

from qwen3ft import faults
from qwen3ft.config import TrainingConfig
from qwen3ft.errors import ConfigError, InsufficientMemoryError, WorkerCrashedError
from qwen3ft.jobs.folders import RunDir
from qwen3ft.jobs.launcher import run_worker
from qwen3ft.machine.gpu_choice import VISIBLE
from qwen3ft.model.adapter import plan_adapter
from qwen3ft.planning.plan import build_plan
from qwen3ft.preflight import policy, stage
from qwen3ft.preflight.cache import keep_report, report_key
from qwen3ft.preflight.stage import measure_first, shortened
from qwen3ft.preflight.worst_batches import find_worst, read_lengths
from qwen3ft.records.machine import GpuInfo
from qwen3ft.records.plan import TrainPlan
from qwen3ft.records.preflight import PreflightResult
from qwen3ft.units import GIB


class Counted(NamedTuple):
    """A preflight's result, and the kinds of the workers that it started."""

    config: TrainingConfig
    plan: TrainPlan
    result: PreflightResult
    run: RunDir
    workers: list[str]


@pytest.fixture(scope="module")
def replanned(
    make_config: Any, environment: Any, snapshot: Any, manifest: Any, tmp_path_factory: Any
) -> Counted:
    """A preflight whose first measurement runs out of memory."""
    folder = tmp_path_factory.mktemp("preflight")
    config = make_config(cache_dir=str(folder / "cache"), preflight="on")
    adapter = plan_adapter(config, snapshot.shape)
    plan = build_plan(config, environment, snapshot, adapter, manifest)
    run, counted = RunDir(folder / "run"), Mock(wraps=run_worker)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(stage, "run_worker", counted)
        patch.setenv(faults.VARIABLE, "oom@step=1:preflight=1")
        result = measure_first(config, environment, plan, run)
        kinds = [call.args[0] for call in counted.call_args_list]
        return Counted(config, plan, result, run, kinds)


def test_memory_that_ran_out_leads_to_exactly_one_new_plan(replanned: Counted) -> None:
    """The new plan asks for less, keeps budget and batch, and is measured too: it fits."""
    first, second = replanned.result.reports
    assert replanned.workers == ["preflight", "preflight"]
    assert first.failure.kind == "OutOfMemoryError"
    assert [phase.phase for phase in first.phases] == ["load", "evaluate"]
    assert (first.fitted, second.fitted) == (False, True)
    plan = replanned.result.plan
    assert plan.predicted_peak_bytes < replanned.plan.predicted_peak_bytes
    assert plan.max_memory_gb == replanned.plan.max_memory_gb
    assert plan.effective_batch_size == replanned.plan.effective_batch_size
    assert "The preflight measured" in plan.reasons["predicted"]


def test_a_preflight_measures_every_phase_and_leaves_nothing_behind(replanned: Counted) -> None:
    """It runs the steps that were asked for, and writes no checkpoint and no attempt."""
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
    monkeypatch.setattr(stage, "run_worker", worker := Mock())
    monkeypatch.setenv(faults.VARIABLE, "oom@step=1:preflight=1")  # a part of the key
    again = measure_first(replanned.config, environment, replanned.plan, RunDir(tmp_path))
    assert not worker.called
    assert [report.from_cache for report in again.reports] == [True, True]
    assert again.plan == replanned.result.plan


def test_a_second_failure_is_left_to_recovery_or_ends_the_run(
    make_plan: Any, make_config: Any, environment: Any, tmp_path: Path
) -> None:
    """There is no third plan: with consent the ladder has rungs left, without it none."""
    plan, run = make_plan(), RunDir(tmp_path / "run")
    settings = {"cache_dir": str(tmp_path / "cache"), "preflight": "on"}
    config = make_config(**settings)
    lengths = read_lengths(plan)
    first = plan
    for lowered in (True, False):
        key = report_key(plan, environment, find_worst(plan, *lengths))
        report = report_of(plan, failure=out_of_memory()).model_copy(update={"key": key})
        keep_report(config, environment, report)
        plan = policy.replan(config, environment, plan, report) if lowered else plan
    with pytest.raises(InsufficientMemoryError, match="nothing is left to lower"):
        measure_first(config, environment, first, run)
    result = measure_first(make_config(**settings, allow_degraded=True), environment, first, run)
    assert [report.from_cache for report in result.reports] == [True, True]
    assert result.plan.predicted == plan.predicted


def test_a_worker_that_fails_otherwise_costs_the_run_nothing(
    make_plan: Any, make_config: Any, environment: Any, tmp_path: Path, monkeypatch: Any
) -> None:
    """Nothing is kept and the plan stays, while a request that cannot be met is an error."""
    failures = [WorkerCrashedError("killed"), ConfigError("a bad request")]
    monkeypatch.setattr(stage, "run_worker", Mock(side_effect=failures))
    config = make_config(cache_dir=str(tmp_path / "cache"), preflight="on")
    plan, run = make_plan(), RunDir(tmp_path / "run")
    result = measure_first(config, environment, plan, run)
    assert (result.plan, result.reports) == (plan, ())
    assert result.skipped
    with pytest.raises(ConfigError):
        measure_first(config, environment, plan, run)
    assert not (tmp_path / "cache").exists()


def test_a_preflight_sees_the_gpus_of_its_plan_alone(
    make_plan: Any, make_config: Any, environment: Any, tmp_path: Path, monkeypatch: Any
) -> None:
    """The run's first GPU may be one that the plan leaves out, because it is filled or lost."""
    gpus = tuple(
        GpuInfo(
            index=index,
            name="H200",
            uuid=f"GPU-{index}",
            total_bytes=141 * GIB,
            free_bytes=140 * GIB,
            driver_version="580",
        )
        for index in range(3)
    )
    seen = []

    def worker(*_: Any, **__: Any) -> None:
        seen.append(os.environ.get(VISIBLE))
        raise WorkerCrashedError("killed")

    monkeypatch.delenv(VISIBLE, raising=False)
    monkeypatch.setattr(stage, "run_worker", worker)
    machine = environment.model_copy(update={"gpus": gpus})
    config = make_config(cache_dir=str(tmp_path / "cache"), preflight="on")
    measure_first(config, machine, make_plan(places=(1, 2)), RunDir(tmp_path / "run"))
    assert seen == ["GPU-1,GPU-2"]
    assert VISIBLE not in os.environ


def test_what_a_preflight_trains_is_a_part_of_the_plan(make_plan: Any) -> None:
    """Only the schedule differs: these steps, with an evaluation and a checkpoint at their end."""
    plan = make_plan(resume_from="somewhere", warmup_steps=7)
    short = shortened(plan, BATCHES, RunDir(Path("run")))
    changed = {
        name for name in TrainPlan.model_fields if getattr(short, name) != getattr(plan, name)
    }
    assert (short.total_steps, short.evaluate_every_steps, short.resume_from) == (2, 2, None)
    schedule = {"total_steps", "evaluate_every_steps", "warmup_steps"}
    assert changed <= schedule | {"resume_from", "run_id", "run_dir"}
