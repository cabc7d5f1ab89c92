"""Before each attempt the plan is held against what other programs leave free of the GPU."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from support.plans import environment, plan_for

from qwen3ft.config import TrainingConfig
from qwen3ft.errors import EnvironmentNotReadyError
from qwen3ft.planning.plan import repredict
from qwen3ft.records.machine import GpuProcess, GpuUse
from qwen3ft.records.plan import TrainPlan
from qwen3ft.recovery.shared_gpu import MARGIN_BYTES, fit_to_free_memory, fit_within
from qwen3ft.units import GIB

CONFIG = TrainingConfig(max_memory_gb=13.0)
MACHINE = environment(24.0)
OTHER = GpuProcess(pid=4711, name="python", used_bytes=int(13.1 * GIB))


def use(free_gb: float) -> GpuUse:
    return GpuUse(total_bytes=24 * GIB, free_bytes=int(free_gb * GIB), processes=(OTHER,))


def probe(*free_gb: float) -> Callable[[str], GpuUse]:
    """Readings one after the other, the last for good."""
    readings = list(free_gb)

    def read(uuid: str) -> GpuUse:
        assert uuid == "GPU-0"
        return use(readings.pop(0) if len(readings) > 1 else readings[0])

    return read


def fit(plan: TrainPlan, *free_gb: float, **wanted: Any) -> TrainPlan:
    config = CONFIG.model_copy(update=wanted)
    return fit_to_free_memory(config, MACHINE, plan, probe=probe(*free_gb), settle_seconds=0)


def test_a_plan_whose_budget_is_free_stays_as_it_is() -> None:
    """Whatever else is on the GPU."""
    plan = plan_for()
    assert fit(plan, 13.0) is plan


def test_less_than_the_budget_but_enough_for_the_plan_lowers_the_budget_alone() -> None:
    """The worker's allocator is then held to what is free, so that nobody else runs out."""
    plan = plan_for()
    free_gb = plan.predicted_peak_bytes / GIB + 0.5
    assert free_gb < plan.max_memory_gb
    fitted = fit(plan, free_gb)
    assert fitted.max_memory_gb * GIB <= free_gb * GIB - MARGIN_BYTES
    unchanged = {"max_memory_gb", "reasons"}
    assert fitted.model_dump(exclude=unchanged) == plan.model_dump(exclude=unchanged)


def test_less_than_the_plan_needs_makes_it_anew_and_says_who_holds_the_rest() -> None:
    """A plan within what is free: the same effective batch, place in the run and learning rate."""
    plan = plan_for().model_copy(
        update={"attempt": 3, "learning_rate": 1e-6, "resume_from": "step-7", "total_steps": 99}
    )
    fitted = fit(plan, 5.0)
    assert fitted.predicted_peak_bytes <= fitted.max_memory_gb * GIB <= 5.0 * GIB - MARGIN_BYTES
    assert fitted.effective_batch_size == plan.effective_batch_size
    assert (
        fitted.memory.micro_batch_size < plan.memory.micro_batch_size
        or fitted.memory.gradient_checkpointing
    )
    for name in ("attempt", "run_id", "run_dir", "learning_rate", "resume_from", "total_steps"):
        assert getattr(fitted, name) == getattr(plan, name), name
    assert fitted.reasons["max_memory_gb"] == (
        "4.75 of 13 GB: python (pid 4711) holds 13.1 GB of the GPU."
    )


def test_what_recovery_changed_is_not_undone() -> None:
    """Shorter rows and a smaller adapter stay, as does what is said about them."""
    plan = plan_for(lora_r=8)
    adapter = plan.adapter.model_copy(update={"r": 4, "alpha": 8})
    change = {"max_sequence_length": 128, "adapter": adapter, "degraded": ("rows of 128",)}
    fitted = fit(plan.model_copy(update=change), 5.0)
    assert fitted.max_memory_gb < 5.0
    assert {name: getattr(fitted, name) for name in change} == change


@given(free_gb=st.floats(0.0, 24.0), budget_gb=st.floats(4.0, 24.0))
def test_a_plan_never_takes_more_than_is_free(free_gb: float, budget_gb: float) -> None:
    """None where nothing fits; never a raised budget."""
    config = TrainingConfig(max_memory_gb=budget_gb)
    plan = plan_for(max_memory_gb=budget_gb)
    fitted = fit_within(config, MACHINE, plan, use(free_gb))
    if fitted is None:
        assert free_gb < 5.0
        return
    assert fitted.predicted_peak_bytes <= fitted.max_memory_gb * GIB <= int(free_gb * GIB)
    assert fitted.max_memory_gb <= plan.max_memory_gb


def test_where_nothing_fits_a_run_refuses_and_names_the_process() -> None:
    """With what is free, what is needed, and the command that would wait."""
    with pytest.raises(EnvironmentNotReadyError) as caught:
        fit(plan_for(), 1.0, when_gpu_is_busy="refuse")
    assert "1.00 of 24.00 GB are free" in caught.value.what
    assert "python (pid 4711) holds 13.1 GB" in caught.value.what
    assert caught.value.next_command == "qwen3ft run --set when_gpu_is_busy=wait"
    assert caught.value.facts["processes"][0]["pid"] == 4711
    json.dumps(caught.value.to_dict())


def test_a_run_waits_for_memory_and_goes_on_with_its_own_plan(
    caplog: pytest.LogCaptureFixture,
) -> None:
    """It says whom it waits for; when the memory is back, nothing has changed."""
    plan = plan_for()
    with caplog.at_level(logging.INFO, "qwen3ft.card"):
        assert fit(plan, 1.0, 20.0) is plan
    [line] = [record.getMessage() for record in caplog.records]
    assert "pid 4711" in line
    assert "waiting" in line


def test_a_wait_for_memory_ends_at_its_limit() -> None:
    """The process that has it can be looked at with the command given."""
    with pytest.raises(EnvironmentNotReadyError) as caught:
        fit(plan_for(), 1.0, wait_for_gpu_seconds=0.5)
    assert caught.value.next_command == "ps -fp 4711"


def test_memory_that_comes_back_late_is_not_taken_for_another_program() -> None:
    """The attempt before was just killed: within the time to settle its memory is free again."""
    plan = plan_for()
    assert (
        fit_to_free_memory(CONFIG, MACHINE, plan, probe=probe(5.0, 20.0), settle_seconds=3) is plan
    )


@pytest.mark.parametrize(
    ("wanted", "gpu_gb", "words"),
    [
        ({"max_memory_gb": 80.0}, 24.0, ["80 GB were allowed, but the GPU has 24.00 GB in all"]),
        ({"max_memory_gb": 80.0}, None, ["this machine has 64.00 GB in all", "on the CPU"]),
        ({"max_memory_gb": 60.0}, None, ["Qwen/Qwen3-4B-Thinking-2507 No CUDA device is visible"]),
        (
            {"max_memory_gb": 60.0, "model_name": "embedded", "kernels": "fused"},
            None,
            ["Without a CUDA device its plain twin runs"],
        ),
        ({"max_memory_gb": 60.0, "model_name": "embedded"}, None, []),
        ({}, 24.0, []),
    ],
)
def test_where_the_machine_is_less_than_asked_for_the_log_and_the_plan_say_so(
    wanted: dict[str, Any], gpu_gb: float | None, words: list[str], caplog: pytest.LogCaptureFixture
) -> None:
    """A budget above the GPU's memory is lowered; a real model, or fused kernels, without a GPU."""
    from flows.run_context import warn_of_limits

    plan = plan_for(gpu_gb=gpu_gb, **wanted)
    with caplog.at_level(logging.WARNING, "qwen3ft.flow"):
        warn_of_limits(TrainingConfig(**wanted), plan)
    lines = [record.getMessage() for record in caplog.records]
    assert len(lines) == len(words)
    for line, word in zip(lines, words, strict=True):
        assert word in line
        assert any(reason in line for reason in plan.reasons.values())


def test_on_a_cpu_nobody_is_asked() -> None:
    """The plan itself, without a GPU to look at."""
    plan = plan_for(gpu_gb=None)
    machine = environment(None)
    assert fit_to_free_memory(CONFIG, machine, plan, probe=probe(0.0), settle_seconds=0) is plan


def machine_of(count: int) -> Any:
    (gpu,) = MACHINE.gpus
    gpus = tuple(
        gpu.model_copy(update={"index": index, "uuid": f"GPU-{index}"}) for index in range(count)
    )
    return MACHINE.model_copy(update={"gpus": gpus})


def fit_ranks(plan: TrainPlan, **by_gpu: float | None) -> TrainPlan:
    def read(uuid: str) -> GpuUse:
        free_gb = by_gpu[uuid.replace("GPU-", "gpu")]
        if free_gb is None:
            raise EnvironmentNotReadyError("The NVIDIA driver does not answer: GPU is lost")
        return use(free_gb)

    return fit_to_free_memory(CONFIG, machine_of(3), plan, probe=read, settle_seconds=0)


def test_ranks_whose_gpu_is_gone_or_filled_are_left_out() -> None:
    """The next attempt runs on those that are left, and names why."""
    plan = plan_for().with_settings(places=(0, 1, 2))
    assert fit_ranks(plan, gpu0=20, gpu1=20, gpu2=20) is plan
    fitted = fit_ranks(plan, gpu0=20, gpu1=None, gpu2=1)
    assert fitted.places == (0,)
    assert fitted.effective_batch_size == plan.effective_batch_size
    for words in ("1 of 3 ranks go on", "GPU is lost", "GPU 2", "python (pid 4711)"):
        assert words in fitted.reasons["places"]


def test_a_host_looks_at_its_own_gpus_and_keeps_one_rank() -> None:
    """Ranks of other hosts stay; the last rank of the run's own host waits for its GPU."""
    plan = plan_for().with_settings(places=(0, 1, 2, 3), places_per_host=2)
    assert fit_ranks(plan, gpu0=20, gpu1=None).places == (0, 2, 3)
    with pytest.raises(EnvironmentNotReadyError, match="GPU is lost"):
        fit_ranks(plan, gpu0=None, gpu1=None)


def test_a_plan_made_anew_is_for_the_ranks_that_are_left() -> None:
    """Of three that were asked for one is left, which exchanges no gradients."""
    plan = plan_for().with_settings(places=(2,))
    config = CONFIG.model_copy(update={"gpus": "3"})
    fitted = fit_within(config, machine_of(3), plan, use(5.0))
    assert fitted is not None
    assert fitted.places == (2,)
    assert fitted.max_memory_gb < 5.0
    assert fitted.predicted == repredict(fitted).predicted


def test_ranks_share_a_plan_that_fits_the_fullest_of_their_gpus() -> None:
    """Less than the budget is free on one, and enough for the plan."""
    plan = plan_for().with_settings(places=(0, 2))
    free_gb = plan.predicted_peak_bytes / GIB + 0.5
    fitted = fit_ranks(plan, gpu0=20, gpu2=free_gb)
    assert fitted.places == (0, 2)
    assert fitted.max_memory_gb < plan.max_memory_gb
