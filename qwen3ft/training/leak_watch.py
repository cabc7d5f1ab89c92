"""Looks for leaks while an attempt trains, and ends it in time: with a checkpoint, losing nothing.

At the ends of steps, for at most `MOST_SHARE` of the time, and not within two steps of an
evaluation or a checkpoint, memory is read and given to the detectors. When one tells of growth,
memory is cleaned up first: what that gives back was garbage and no leak. What stays is told once as
a warning. The attempt ends with MemoryLeakError only where the budget would run out before the run
does, as late as is safe (`qwen3ft.machine.leaks.must_stop`): it saves at that step and then raises,
and recovery goes on from there in a fresh process.

What the readings took is in the log at the end; `benchmarks/leak.py` measured 0.2 % of the time,
with steps of 70 ms.
"""

from __future__ import annotations

import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from qwen3ft.errors import MemoryLeakError
from qwen3ft.logs import get_logger
from qwen3ft.machine.fragmentation import FragmentationDetector
from qwen3ft.machine.leaks import MIB, Growth, LeakDetector, describe, leak_error, must_stop
from qwen3ft.machine.memory_snapshot import PeakKeeper
from qwen3ft.machine.process_memory import MemoryReading, free_host_bytes, read_memory
from qwen3ft.units import GIB

if TYPE_CHECKING:
    from qwen3ft.machine.memory import MemoryOptimizer

logger = get_logger("leaks")

MOST_SHARE = 0.005
"""Of the time for reading and judging: after a reading none is made until it is paid for."""

LONGEST_PAUSE_SECONDS = 0.25
SETTLING_STEPS = 2
LEAST_MARGIN_BYTES = 64 * MIB
MARGIN_SHARE = 0.02
"""Of the budget, kept for the checkpoint that an ending attempt writes."""

GIVEN_BACK_SHARE = 0.5
"""If a clean-up gives back this much of what grew, it was no leak."""

LATER_FACTOR = 8
"""Garbage that piles up again is looked at later each time: a clean-up takes some 0.1 s."""

HOST, DEVICE = "resident memory", "memory of tensors"


class LeakWatch(TrainerCallback):
    """The callback of one attempt.

    Args:
        memory: The budget, and what is left of it.
        report: Folder that gets the counters of the step with the peak.
    """

    def __init__(self, memory: MemoryOptimizer, report: Path) -> None:
        self.memory = memory
        self.peak = PeakKeeper(report, memory.device)
        self.spent_seconds = 0.0
        self.readings = 0
        self._detectors = {HOST: LeakDetector(HOST)}
        if memory.device == "cuda":
            self._detectors[DEVICE] = LeakDetector(DEVICE)
        self._fragmentation = FragmentationDetector()
        self._next_reading = 0.0
        self._last_step: int | None = None
        self._disturbed_at = -SETTLING_STEPS
        self._warned: set[str] = set()
        self._error: MemoryLeakError | None = None

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        """Read and judge, if it is time."""
        step = state.global_step
        settling = min(SETTLING_STEPS, int(args.eval_steps or SETTLING_STEPS))
        if time.monotonic() < self._next_reading or step - self._disturbed_at < settling:
            return
        started = time.thread_time()  # what others take of a busy machine does not count
        reading = read_memory(step, self.memory.device)
        self.peak.see(reading)
        self._error = self._find_leak(reading, state.max_steps - step)
        if self._error is not None:
            control.should_evaluate = False
            control.should_save = control.should_training_stop = True
        self._last_step = step
        self.readings += 1
        spent_seconds = time.thread_time() - started
        self.spent_seconds += spent_seconds
        pause_seconds = min(LONGEST_PAUSE_SECONDS, spent_seconds / MOST_SHARE)
        self._next_reading = time.monotonic() + pause_seconds

    def on_evaluate(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        """What an evaluation left behind may take a step to go."""
        self._disturbed_at = state.global_step

    def on_save(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        """The checkpoint is there: now the attempt may end.

        Raises:
            MemoryLeakError: decided at the end of this step.
        """
        self._disturbed_at = state.global_step
        if self._error is not None:
            raise self._error

    def _find_leak(self, reading: MemoryReading, steps_to_end: int) -> MemoryLeakError | None:
        values = {HOST: reading.private_bytes, DEVICE: reading.allocated_bytes}
        for series, detector in self._detectors.items():
            judged = detector.add(reading.step, values[series])
            growth = detector.growth
            if growth is None or not (judged or series in self._warned):
                continue
            if not self._is_leak(growth, detector, reading):
                continue
            left_bytes = self._left_bytes(series, reading)
            if must_stop(
                growth,
                left_bytes,
                steps_to_end,
                margin_bytes=self._margin_bytes(),
                steps_between=reading.step - (self._last_step or 0),
            ):
                return leak_error(growth, left_bytes, reading.step)
        self._fragmentation.add(reading)
        if self._fragmentation.worn_out(reading) and steps_to_end > 0:
            return self._fragmentation.error(reading)
        return None

    def _is_leak(self, growth: Growth, detector: LeakDetector, reading: MemoryReading) -> bool:
        """Whether growth survives a clean-up, which is tried once, before the warning."""
        series = growth.series
        if series in self._warned:
            return True
        self.memory.cleanup_gpu_memory()
        after = read_memory(reading.step, self.memory.device)
        before_bytes, after_bytes = (
            (reading.private_bytes, after.private_bytes)
            if series == HOST
            else (reading.allocated_bytes, after.allocated_bytes)
        )
        if before_bytes - after_bytes >= GIVEN_BACK_SHARE * growth.grown_bytes:
            logger.info(
                "%s grew by %.0f MiB; a clean-up gave %.0f MiB back: no leak",
                series,
                growth.grown_bytes / MIB,
                (before_bytes - after_bytes) / MIB,
            )
            detector.restart()
            detector.warm_up_steps *= LATER_FACTOR
            return False
        self._warned.add(series)
        logger.warning("%s", describe(growth, self._left_bytes(series, after)))
        return True

    def _left_bytes(self, series: str, reading: MemoryReading) -> int:
        """What is left for `series`.

        On a GPU that is the budget less the highest peak: each step, or the next evaluation, needs
        as much again on top of what leaked.
        """
        if series == HOST and self.memory.device == "cuda":
            return free_host_bytes()
        status = self.memory.status()
        if series == HOST:
            return int(status.available_gb * GIB)
        held_bytes = reading.reserved_bytes - reading.peak_allocated_bytes
        return max(0, int(status.available_gb * GIB) + held_bytes)

    def _margin_bytes(self) -> int:
        return max(LEAST_MARGIN_BYTES, int(MARGIN_SHARE * self.memory.max_memory_gb * GIB))
