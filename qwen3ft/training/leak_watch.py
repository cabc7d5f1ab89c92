"""Leak watch: a callback that ends an attempt in time, with a checkpoint, when memory leaks.

Memory is read at the ends of steps, except within two steps of an evaluation or a checkpoint. When
a detector reports growth, memory is cleaned up once; growth that survives is logged as a warning.
The attempt ends with MemoryLeakError only if the budget would run out before the run ends, and as
late as is safe (`qwen3ft.machine.leaks.must_stop`). It saves a checkpoint first, and recovery
resumes from it in a fresh process.

`benchmarks/leak.py` measured a cost of 0.2 % of the time, with steps of 70 ms.
"""

from __future__ import annotations

import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from qwen3ft.errors import MemoryLeakError
from qwen3ft.logs import get_logger
from qwen3ft.machine.leaks import Growth, LeakDetector, describe, leak_error, must_stop
from qwen3ft.machine.memory_report import PeakRecorder
from qwen3ft.machine.process_memory import MemoryReading, free_host_bytes, read_memory
from qwen3ft.units import GIB, MIB

if TYPE_CHECKING:
    from qwen3ft.jobs.heartbeat import StopRequest
    from qwen3ft.machine.memory import MemoryOptimizer

logger = get_logger("leaks")

MOST_SHARE = 0.005
"""Largest share of time to spend on readings; the next waits until the last is amortised."""

LONGEST_READING_PAUSE_SECONDS = 0.25
SETTLING_STEPS = 2
LEAST_MARGIN_BYTES = 64 * MIB
MARGIN_SHARE = 0.02
"""Share of the budget reserved for the checkpoint that an ending attempt writes."""

GIVEN_BACK_SHARE = 0.5
"""Growth is no leak if a clean-up gives back this share of it."""

LATER_FACTOR = 8
"""Factor on the warm-up after each such clean-up, which takes about 0.1 s."""

HOST, DEVICE = "resident memory", "memory of tensors"


class LeakWatch(TrainerCallback):
    """The callback of one attempt.

    Args:
        memory: The budget and the present use of it.
        report: Folder for the counters of the step with the highest peak.
        most_share: Largest share of time to spend on readings.
        stop: Set on a leak, for all ranks to stop together; None if this process is alone.
        graphs: Rows run as CUDA graphs.
    """

    def __init__(
        self,
        memory: MemoryOptimizer,
        report: Path,
        *,
        most_share: float = MOST_SHARE,
        stop: StopRequest | None = None,
        graphs: bool = False,
    ) -> None:
        self.memory = memory
        self.graphs = graphs
        self.stop = stop
        self.most_share = most_share
        self.peak = PeakRecorder(report, memory.device)
        self.spent_seconds = 0.0
        self.readings = 0
        self._detectors = {HOST: LeakDetector(HOST)}
        if memory.device == "cuda":
            self._detectors[DEVICE] = LeakDetector(DEVICE)
        self._next_reading = 0.0
        self._last_step: int | None = None
        self._disturbed_at = -SETTLING_STEPS
        self._warned: set[str] = set()
        self._error: MemoryLeakError | None = None

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        """Read memory if a reading is due, and have the attempt save and end on a leak."""
        step = state.global_step
        # With an evaluation at each step there would never be a reading.
        settling = min(SETTLING_STEPS, int(args.eval_steps or SETTLING_STEPS))
        if time.monotonic() < self._next_reading or step - self._disturbed_at < settling:
            return
        if self._error is not None:  # the other ranks are one step behind in knowing
            return
        started = time.thread_time()  # CPU time: waiting on a busy machine is not our cost
        reading = read_memory(step, self.memory.device)
        self.peak.add(reading)
        self._error = self._find_leak(reading, state.max_steps - step)
        if self._error is not None and self.stop is not None:
            self.stop.signal_name = type(self._error).__name__
        elif self._error is not None:
            control.should_evaluate = False
            control.should_save = control.should_training_stop = True
        self._last_step = step
        self.readings += 1
        spent_seconds = time.thread_time() - started
        self.spent_seconds += spent_seconds
        pause_seconds = min(LONGEST_READING_PAUSE_SECONDS, spent_seconds / self.most_share)
        self._next_reading = time.monotonic() + pause_seconds

    def on_evaluate(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        """Skip the next readings: memory of an evaluation may take a step to be freed."""
        self._disturbed_at = state.global_step

    def on_save(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        """Raise the error of this step now that its checkpoint is saved.

        Raises:
            MemoryLeakError: found at the end of this step.
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
        return None

    def _is_leak(self, growth: Growth, detector: LeakDetector, reading: MemoryReading) -> bool:
        """Return True if growth survives a clean-up, which is tried once, before the warning."""
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
                "%s grew by %.0f MiB; a clean-up freed %.0f MiB of it: no leak",
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
        """Return the bytes that `series` may still grow by."""
        if series == HOST and self.memory.device == "cuda":
            return free_host_bytes()
        status = self.memory.status()
        if series == HOST:
            return int(status.available_gb * GIB)
        # Budget less the highest peak: a step or evaluation needs that again on top of the leak.
        # CUDA graphs hold the memory of rows, though nothing in it is allocated between them.
        held_bytes = 0 if self.graphs else reading.reserved_bytes - reading.peak_allocated_bytes
        return max(0, int(status.available_gb * GIB) + held_bytes)

    def _margin_bytes(self) -> int:
        return max(LEAST_MARGIN_BYTES, int(MARGIN_SHARE * self.memory.max_memory_gb * GIB))
