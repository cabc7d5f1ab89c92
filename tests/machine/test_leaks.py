"""Leaks: detection of growth, the end of an attempt, and a planted leak in a worker."""

from __future__ import annotations

import gc
import json
import logging
import math
import mmap
from collections.abc import Callable, Iterable
from pathlib import Path
from random import Random
from typing import Any

import psutil
import pytest
from transformers import TrainerControl, TrainerState, TrainingArguments

from qwen3ft import faults
from qwen3ft.errors import ConfigError, MemoryLeakError
from qwen3ft.jobs.folders import RunDir
from qwen3ft.jobs.heartbeat import StopRequest
from qwen3ft.jobs.launcher import run_worker
from qwen3ft.machine.leaks import (
    GROWTH_LIMIT_BYTES,
    Growth,
    LeakDetector,
    ends_early,
    leak_error,
    must_stop,
    theil_sen,
)
from qwen3ft.machine.memory import MemoryOptimizer
from qwen3ft.machine.process_memory import private_bytes, reading_of
from qwen3ft.records.training import AttemptOutcome, Failure
from qwen3ft.recovery.adjust import FailedAttempt, Retry, decide_retry
from qwen3ft.training import checkpoint
from qwen3ft.training.leak_watch import LeakWatch
from qwen3ft.units import GIB, MIB

LEVEL = 600 * MIB


def first_growth(readings: Iterable[float]) -> Growth | None:
    """Return the first growth reported, with a reading at each step."""
    detector = LeakDetector("resident memory")
    for step, used_bytes in enumerate(readings):
        detector.add(step, int(used_bytes))
        if detector.growth is not None:
            return detector.growth
    return None


def noisy(draw: Random, deviation_mib: float, count: int = 1500) -> list[float]:
    return [LEVEL + draw.gauss(0, deviation_mib * MIB) for _ in range(count)]


# --- no leak ---


def shifted(at: int) -> Callable[[int], float]:
    return lambda i: 200 if i > at else 0


NO_LEAKS: dict[str, tuple[float, Callable[[int], float]]] = {
    "a level": (0, lambda _: 0),
    "small noise": (1, lambda _: 0),
    "large noise": (64, lambda _: 0),
    "spikes of evaluations": (2, lambda i: 500 * (Random(i).random() < 0.05)),
    "a saw of 7 readings a tooth": (1, lambda i: 40 * (i % 7) / 7),
    "a saw of 30": (1, lambda i: 40 * (i % 30) / 30),
    "a saw of 47": (1, lambda i: 40 * (i % 47) / 47),
    "caches filled early": (2, shifted(40)),
    "caches filled by a first evaluation": (2, shifted(333)),
    "caches filled late": (2, shifted(900)),
    "a warm-up with a time constant of 5 readings": (2, lambda i: 300 * (1 - math.exp(-i / 5))),
}
"""Deviation of the noise in MiB, and the MiB more at each reading."""


@pytest.mark.parametrize("name", NO_LEAKS)
def test_what_stays_on_a_level_is_no_growth(name: str) -> None:
    """Noise, spikes, garbage that is collected, and a level that shifts once."""
    deviation_mib, more_mib = NO_LEAKS[name]
    for seed in range(2):
        readings = noisy(Random(seed), deviation_mib)
        assert first_growth(used + more_mib(i) * MIB for i, used in enumerate(readings)) is None


def test_later_teeth_that_reach_no_new_ground_are_no_growth() -> None:
    """Where teeth are longer than the narrowest view, at most the first one is taken for growth."""
    detector, reported = LeakDetector("resident memory"), []
    for step, used in enumerate(noisy(Random(0), 1, 2000)):
        detector.add(step, int(used + 40 * MIB * (step % 200) / 200))
        reported += [step] if detector.growth else []
    assert reported
    assert max(reported) < 400


@pytest.mark.parametrize("at", [40, 333, 900])
def test_a_level_that_shifts_once_is_no_growth(at: int) -> None:
    """The first evaluation fills caches that stay."""
    for seed in range(4):
        shifted = [u + (200 * MIB if i > at else 0) for i, u in enumerate(noisy(Random(seed), 2))]
        assert first_growth(shifted) is None


def test_a_warm_up_that_is_soon_over_is_no_growth() -> None:
    """300 MiB, with a time constant of 5 readings."""
    settling = [u + 300 * MIB * (1 - math.exp(-i / 5)) for i, u in enumerate(noisy(Random(1), 2))]
    assert first_growth(settling) is None


def test_growth_that_has_ended_is_not_reported_for_ever() -> None:
    """300 steps of 1 MiB, then flat: withdrawn once all widths have seen that."""
    detector = LeakDetector("resident memory")
    for step in range(300):
        detector.add(step, LEVEL + step * MIB)
    assert detector.growth is not None
    for step in range(300, 1500):
        detector.add(step, LEVEL + 300 * MIB)
    assert detector.growth is None


# --- leaks ---


@pytest.mark.parametrize(
    ("mib_per_step", "noise_mib", "within"),
    [(1.0, 0.0, 60), (1.0, 4.0, 80), (0.1, 1.0, 240), (0.1, 4.0, 350), (0.02, 1.0, 1600)],
)
def test_a_leak_is_reported_in_time_with_its_slope(
    mib_per_step: float, noise_mib: float, within: int
) -> None:
    """1 MiB a step within 80 readings, 100 KiB within 350, in noise of up to 4 MiB."""
    for seed in range(2):
        readings = [
            u + mib_per_step * MIB * i for i, u in enumerate(noisy(Random(seed), noise_mib, 2000))
        ]
        growth = first_growth(readings)
        assert growth is not None
        assert growth.step <= within
        assert growth.mib_per_1000_steps == pytest.approx(1000 * mib_per_step, rel=0.3)


def test_a_leak_that_starts_late_is_reported_as_soon_with_its_start() -> None:
    """After 1,000 flat readings, 1 MiB a step: within 60 readings, and since then."""
    readings = [u + max(0, i - 1000) * MIB for i, u in enumerate(noisy(Random(0), 0.5))]
    growth = first_growth(readings)
    assert growth is not None
    assert 1020 <= growth.step <= 1060
    assert growth.since_step == pytest.approx(1000, abs=12)
    assert growth.grown_bytes == pytest.approx((growth.step - 1000) * MIB, rel=0.1)


def test_a_leak_at_each_evaluation_is_reported() -> None:
    """A staircase, 4 MiB every 20 readings."""
    readings = [u + (i // 20) * 4 * MIB for i, u in enumerate(noisy(Random(0), 0.5, 1500))]
    growth = first_growth(readings)
    assert growth is not None
    assert growth.mib_per_1000_steps == pytest.approx(200, rel=0.1)


def test_the_slope_is_robust_to_a_quarter_of_outliers() -> None:
    """Theil-Sen: 3 of 12 points anywhere move it little."""
    points = [(float(x), 2.0 * x) for x in range(12)]
    for index in (2, 5, 9):
        points[index] = (points[index][0], 1e6)
    assert theil_sen(points) == pytest.approx(2.0, rel=0.05)
    assert theil_sen([(1.0, 5.0)]) == 0.0


# --- consequences ---


def growth_of(mib_per_step: float, grown_mib: float = 100) -> Growth:
    return Growth("resident memory", mib_per_step * MIB, 100, 200, int(grown_mib * MIB))


def test_an_attempt_ends_only_if_its_budget_would_run_out_first() -> None:
    """And only when little is left, or the absolute limit is exceeded."""
    fast = growth_of(1.0)
    ask = {"margin_bytes": 64 * MIB, "steps_between": 1}
    assert ends_early(fast, 500 * MIB, steps_to_end=501)
    assert not ends_early(fast, 500 * MIB, steps_to_end=499)
    assert not must_stop(fast, 50 * MIB, 40, **ask)  # the run ends first
    assert not must_stop(fast, 500 * MIB, 10_000, **ask)  # enough left for now
    assert must_stop(fast, 80 * MIB, 10_000, **ask)
    assert must_stop(fast, 110 * MIB, 10_000, margin_bytes=64 * MIB, steps_between=30)
    assert not must_stop(growth_of(0.001, 20), 500 * MIB, 10_000, **ask)  # harms nobody
    huge = growth_of(1.0, GROWTH_LIMIT_BYTES / MIB)
    assert must_stop(huge, 100 * GIB, 10_000, **ask)


def test_the_error_has_slope_start_and_the_rest_of_the_budget() -> None:
    """In words and as facts, and it survives JSON."""
    error = leak_error(growth_of(0.25), 500 * MIB, 230)
    assert "250.0 MiB per 1,000 steps since step 100" in error.what
    assert "500 MiB of the budget are left, enough for 2,000 steps" in error.what
    facts = json.loads(Failure.from_error(error).model_dump_json())["facts"]
    assert facts["mib_per_1000_steps"] == 250.0
    assert (facts["since_step"], facts["step"], facts["steps_until_full"]) == (100, 230, 2000)


def test_a_reading_takes_torchs_counters_by_their_names() -> None:
    """Counters that a backend lacks are 0."""
    counters = {"allocated_bytes.all.current": 5, "reserved_bytes.all.current": 10}
    counters |= {"inactive_split_bytes.all.current": 2, "num_alloc_retries": 1}
    reading = reading_of(7, 100, counters)
    assert (reading.step, reading.private_bytes, reading.allocated_bytes) == (7, 100, 5)
    assert (reading.retries, reading.peak_allocated_bytes) == (1, 0)


def test_private_memory_counts_what_is_written_and_no_mapped_file(tmp_path: Path) -> None:
    """64 MiB of written pages count; 64 MiB of a mapped file that is read do not (Linux)."""
    path = tmp_path / "large"
    path.write_bytes(b"x" * (64 * MIB))
    before = private_bytes()
    with path.open("rb") as stream, mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ) as view:
        assert sum(view[:: 2**12]) > 0
        mapped = private_bytes() - before
        # Not on the heap, which may have as much left from another test.
        kept = mmap.mmap(-1, 64 * MIB, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        for _ in range(64):
            kept.write(b"y" * MIB)
        written = private_bytes() - before - mapped
    assert mapped < 8 * MIB
    assert written == pytest.approx(len(kept), rel=0.1)


# --- the callback ---


@pytest.fixture
def train_steps(tmp_path: Path) -> Callable[..., tuple[LeakWatch, TrainerControl]]:
    """Return a function that ends steps with `left_mib` left, calling `work` before each."""

    def run(
        steps: int,
        left_mib: float,
        work: Callable[[], None],
        *,
        of_steps: int = 100_000,
        stop: StopRequest | None = None,
    ) -> tuple[LeakWatch, TrainerControl]:
        MemoryOptimizer(1.0, "cpu").cleanup_gpu_memory()  # else what is free hides growth
        budget_gb = (psutil.Process().memory_info().rss / MIB + left_mib) / 1024
        # Every step is read, however short it is.
        memory = MemoryOptimizer(budget_gb, "cpu")
        watch = LeakWatch(memory, tmp_path / "memory", most_share=1e6, stop=stop)
        args = TrainingArguments(output_dir=str(tmp_path), use_cpu=True, eval_steps=50)
        state, control = TrainerState(max_steps=of_steps), TrainerControl()
        for step in range(1, steps + 1):
            state.global_step = step
            work()
            watch.on_step_end(args, state, control)
            if control.should_save:
                watch.on_save(args, state, control)
        return watch, control

    return run


def test_garbage_that_a_clean_up_takes_is_no_leak(
    train_steps: Any, caplog: pytest.LogCaptureFixture
) -> None:
    """Uncollected cycles of 1 MiB each: logged, freed, and training goes on."""
    caplog.set_level(logging.INFO)

    def make_cycle() -> None:
        # Not on the heap, which may keep what is freed.
        block = mmap.mmap(-1, MIB, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        block.write(b"x" * MIB)
        cycle: list[Any] = [block]
        cycle.append(cycle)

    gc.disable()
    try:
        _, control = train_steps(120, 2000, make_cycle)
    finally:
        gc.enable()
    assert "no leak" in caplog.text
    assert not [record for record in caplog.records if record.levelno >= logging.WARNING]
    assert not control.should_save


def test_a_leak_is_warned_of_once_and_ends_the_attempt_after_it_saved(
    train_steps: Any, caplog: pytest.LogCaptureFixture
) -> None:
    """2 MiB a step with 400 MiB left: a warning on the way, the error from the save."""
    kept: list[bytes] = []
    with pytest.raises(MemoryLeakError, match="per 1,000 steps since step") as caught:
        train_steps(400, 400, lambda: kept.append(b"x" * (2 * MIB)))
    assert caught.value.facts["mib_per_1000_steps"] == pytest.approx(2000, rel=0.15)
    assert len([record for record in caplog.records if record.levelno == logging.WARNING]) == 1
    assert 2 * len(kept) < 400


def test_a_leak_in_one_rank_asks_all_to_stop_before_it_is_raised(train_steps: Any) -> None:
    """The ranks save together, a step after they have told each other."""
    stop, kept = StopRequest(), list[bytes]()

    def leak() -> None:
        if stop.signal_name is None:
            kept.append(b"x" * (2 * MIB))

    watch, control = train_steps(220, 400, leak, stop=stop)
    assert stop.signal_name == "MemoryLeakError"
    assert not control.should_save
    with pytest.raises(MemoryLeakError):
        watch.on_save(None, TrainerState(), control)


def test_a_harmless_leak_is_only_warned_of(
    train_steps: Any, caplog: pytest.LogCaptureFixture
) -> None:
    """The budget lasts longer than the run: 1 MiB a step, 150 steps, 180 MiB left."""
    kept: list[bytes] = []
    _, control = train_steps(140, 180, lambda: kept.append(b"x" * MIB), of_steps=150)
    assert "grows by" in caplog.text
    assert not control.should_save


# --- the whole way ---


@pytest.mark.slow
def test_a_planted_leak_ends_its_attempt_with_a_checkpoint_and_a_fresh_process_goes_on(
    monkeypatch: pytest.MonkeyPatch, make_plan: Any, tmp_path: Path
) -> None:
    """Found before memory runs out; nothing is lost; the next attempt has the same plan."""
    many = {"total_steps": 100_000, "evaluate_every_steps": 50_000, "max_memory_gb": 1.3}
    many |= {"micro_batch_size": 4, "effective_batch_size": 4}  # short steps
    plan, run = make_plan(**many), RunDir(tmp_path / "run")
    monkeypatch.setenv(faults.VARIABLE, "leak@step=5:kib=2048")
    job = run.attempt(1).create(plan)
    with pytest.raises(MemoryLeakError) as caught:
        run_worker("train", job, AttemptOutcome, stall_seconds=120)
    facts = caught.value.facts
    assert facts["series"] == "resident memory"
    assert facts["mib_per_1000_steps"] == pytest.approx(2000, rel=0.1)
    assert facts["since_step"] < 100
    assert facts["left_mib"] > 0
    newest = checkpoint.newest_verified([run.attempt(1).checkpoints], checkpoint.lineage(plan))
    assert newest is not None
    assert newest.step == facts["step"]
    decision = decide_retry(
        [FailedAttempt(plan, Failure.from_error(caught.value))],
        max_attempts=5,
        allow_degraded=False,
        newest_checkpoint=str(newest.path),
    )
    assert isinstance(decision, Retry)
    assert decision.change == {}
    wanted = plan.for_run("run", str(run.path), attempt=2, resume_from=str(newest.path))
    assert decision.plan.model_dump(exclude={"predicted"}) == wanted.model_dump(
        exclude={"predicted"}
    )
    report = run.attempt(1).memory_report
    assert "rss" in (report / "resident.txt").read_text()
    assert json.loads((report / "peak.json").read_text())["private_bytes"] > 0.5 * GIB


def test_a_leak_is_planted_only_with_its_amount(monkeypatch: pytest.MonkeyPatch) -> None:
    """It strikes at every step from its first one on; other faults at theirs."""
    monkeypatch.setenv(faults.VARIABLE, "leak@step=3:kib=64:attempt=2,oom@step=4")
    leak, oom = faults.planted_faults()
    assert (leak.action, leak.step, leak.attempt, leak.leak_bytes) == ("leak", 3, 2, 65536)
    assert [step for step in range(6) if leak.is_due(step)] == [3, 4, 5]
    assert [step for step in range(6) if oom.is_due(step)] == [4]
    monkeypatch.setenv(faults.VARIABLE, "leak@step=3")
    with pytest.raises(ConfigError, match="leak@step=3"):
        faults.planted_faults()


def test_faults_are_read_from_a_file_that_changes(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """So each of several runs of one worker has its own."""
    file = tmp_path / "faults"
    monkeypatch.setenv(faults.VARIABLE, f"@{file}")
    for text, actions in (("oom@step=4\n", ["oom"]), ("", [])):
        file.write_text(text)
        assert [fault.action for fault in faults.planted_faults()] == actions
