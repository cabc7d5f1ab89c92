"""Measure memory inside a preflight worker: train a few chosen steps, phase by phase.

Everything is that of a training attempt, from its data loader to its checkpoint; only the rows of
each step are given. Counters of peaks start anew with every phase, where the system allows it:
torch's always, Linux's for the resident set.

Not covered: fragmentation over many steps of varying length, CUDA graphs of more sizes of rows than
these steps have, host memory of a checkpoint beside a GPU, and libraries that take memory at a
first use later.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from qwen3ft.disk.files import append_json_line
from qwen3ft.faults import planted_in_preflight
from qwen3ft.jobs.folders import JobDir
from qwen3ft.preflight.report import completed_phases, phases_path
from qwen3ft.records.preflight import Measurement, Phase, PhaseMemory, PreflightRequest
from qwen3ft.training.planted import FaultCallback
from qwen3ft.units import GIB

if TYPE_CHECKING:
    from qwen3ft.machine.memory import MemoryOptimizer
    from qwen3ft.training.engine import TrainingEngine
    from qwen3ft.training.trainer import QATrainer

_CLEAR_PEAK = Path("/proc/self/clear_refs")


def measure(
    engine: TrainingEngine, trainer: QATrainer, request: PreflightRequest, meter: PhaseMeter
) -> Measurement:
    """Train the steps of `request`, evaluate its batches, save a checkpoint; return the memory.

    Args:
        engine: Engine for the plan of `request`.
        trainer: Trainer of `engine`, not yet trained.
        request: The plan and the batches to run.
        meter: Meter that was started before the model was loaded.

    Raises:
        OutOfMemoryError: Memory ran out, as in training.
    """
    batches = request.batches
    held_out = [row for batch in batches.evaluate for row in batch.rows]
    trainer.sampler = ChosenSteps(batches.steps())
    trainer.eval_dataset = trainer.eval_dataset.select(held_out)
    trainer.remove_callback(FaultCallback)  # its faults are meant for attempts
    if faults := planted_in_preflight(request.number):
        trainer.add_callback(FaultCallback(faults))
    trainer.add_callback(meter)
    if request.plan.memory.graphs:  # recorded before the first step, they hold rows' memory
        meter.enter("forward_backward")
    engine.train_model(trainer)
    meter.close()
    trained = (p for p in trainer.model.parameters() if p.requires_grad)
    return Measurement(
        device=_device_name(request.plan.device),
        before_bytes=meter.before_bytes,
        adapter_bytes=sum(parameter.numel() * parameter.element_size() for parameter in trained),
        phases=completed_phases(engine.job),
        seconds=time.monotonic() - meter.started,
    )


class ChosenSteps:
    """Sampler of given steps, in place of the trainer's `StepSampler`."""

    def __init__(self, steps: Sequence[Sequence[Sequence[int]]]) -> None:
        self.steps = steps
        self.batch_size = max(sum(map(len, step)) for step in steps)
        self.drop_last = False

    def __len__(self) -> int:
        return len(self.steps)

    def __iter__(self) -> Iterator[list[list[int]]]:
        for step in self.steps:
            yield [list(rows) for rows in step]


class PhaseMeter(TrainerCallback):
    """Callback that writes the memory of each phase to `phases.jsonl` when the phase ends.

    A worker that dies leaves the lines of the phases before.
    """

    def __init__(self, job: JobDir, memory: MemoryOptimizer) -> None:
        self.path = phases_path(job)
        self.path.unlink(missing_ok=True)
        self.memory = memory
        self.started = self._since = time.monotonic()
        self.before_bytes = self._in_use_bytes() if memory.device == "cpu" else 0
        self._phase: Phase | None = "load"

    def enter(self, phase: Phase) -> None:
        """End the phase before, and begin this one."""
        self.close()
        self._phase = phase

    def close(self) -> None:
        """Write what the phase took, and reset the counters."""
        if self._phase is None:
            return
        if self.memory.device == "cuda":
            import torch

            torch.cuda.synchronize()  # for the time; memory is counted when it is asked for
        now = time.monotonic()
        allocated_gb, reserved_gb, process_gb = self.memory.peak()
        memory = PhaseMemory(
            phase=self._phase,
            allocated_bytes=_to_bytes(allocated_gb),
            reserved_bytes=_to_bytes(reserved_gb),
            process_bytes=_to_bytes(process_gb),
            resting_bytes=self._in_use_bytes(),
            seconds=now - self._since,
        )
        append_json_line(self.path, memory.model_dump(mode="json"))
        self._phase, self._since = None, now
        _reset_peaks(self.memory.device)

    def _in_use_bytes(self) -> int:
        return _to_bytes(self.memory.monitor_gpu_memory()[0])

    def on_prediction_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        """Begin the evaluation; the first prediction step comes before the first batch."""
        if self._phase != "evaluate":
            self.enter("evaluate")

    def on_evaluate(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        """Begin saving, or the first step after the evaluation at the start."""
        self.enter("save" if control.should_save else "forward_backward")

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        """Begin the micro-batches of a step."""
        if self._phase != "forward_backward":
            self.enter("forward_backward")

    def on_pre_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        """Begin the optimizer: gradients are complete and clipped."""
        self.enter("optimizer")


def _reset_peaks(device: str) -> None:
    """Reset the counters of peaks to what is in use now."""
    if device == "cuda":
        import torch

        torch.cuda.reset_peak_memory_stats()
        return
    try:
        _CLEAR_PEAK.write_text("5", encoding="ascii")  # proc(5): the peak resident set
    except OSError:
        return  # peaks of later phases then include those of earlier ones


def _device_name(device: str) -> str:
    if device == "cpu":
        return "cpu"
    import torch

    return str(torch.cuda.get_device_name())


def _to_bytes(gb: float) -> int:
    return round(gb * GIB)
