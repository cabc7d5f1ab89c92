"""The measuring inside a preflight worker: the training of a few steps, with a meter beside it.

Guarantees: what runs is the trainer of a training attempt, from its data loader to its checkpoint;
only which rows share a step is given. The peak of each phase is its own: counters start anew with
every phase, where the system lets them (torch's always, Linux's of the resident set).

Not covered: what fragments the allocator's cache over many steps of varying length, what a
checkpoint takes of host memory beside a GPU, and libraries that take memory at a first use later.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from qwen3ft.files import append_json_line
from qwen3ft.jobs.folders import JobDir
from qwen3ft.preflight.report import completed_phases, phases_path
from qwen3ft.records.preflight import Measurement, Phase, PhaseMemory, PreflightRequest
from qwen3ft.training.callbacks import FaultCallback
from qwen3ft.training.faults import planted_in_preflight
from qwen3ft.units import GIB

if TYPE_CHECKING:
    from qwen3ft.machine.memory import MemoryOptimizer
    from qwen3ft.training.engine import TrainingEngine
    from qwen3ft.training.trainer import QATrainer

_CLEAR_PEAK = Path("/proc/self/clear_refs")


def measure(
    engine: TrainingEngine, trainer: QATrainer, request: PreflightRequest, meter: PhaseMeter
) -> Measurement:
    """Train the steps of `request`, evaluate its batches, save a checkpoint; how much it took.

    Args:
        engine: Of the plan of `request`.
        trainer: Of `engine`, not yet trained.
        request: What is run.
        meter: Started before the model was loaded.

    Raises:
        OutOfMemoryError: as training raises it.
    """
    batches = request.batches
    held_out = [row for batch in batches.evaluate for row in batch.rows]
    trainer.sampler = ChosenSteps(batches.steps())
    trainer.eval_dataset = trainer.eval_dataset.select(held_out)
    trainer.remove_callback(FaultCallback)  # those of attempts
    if faults := planted_in_preflight(request.number):
        trainer.add_callback(FaultCallback(faults))
    trainer.add_callback(meter)
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
    """Stands where the trainer has its `StepSampler`: these steps and no others."""

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
    """Writes the memory of each phase when it ends, as a line of `phases.jsonl`.

    A worker that ends in the middle leaves the lines of the phases before.
    """

    def __init__(self, job: JobDir, memory: MemoryOptimizer) -> None:
        self.path = phases_path(job)
        self.path.unlink(missing_ok=True)
        self.memory = memory
        self.started = self._since = time.monotonic()
        self.before_bytes = self._in_use_bytes() if memory.device == "cpu" else 0
        self._phase: Phase | None = "load"

    def enter(self, phase: Phase) -> None:
        """The phase before ends here, and this one begins."""
        self.close()
        self._phase = phase

    def close(self) -> None:
        """Write what the phase took, and count anew."""
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
        """The first one comes before the first batch."""
        if self._phase != "evaluate":
            self.enter("evaluate")

    def on_evaluate(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        """After the one at the start comes the first step."""
        self.enter("save" if control.should_save else "forward_backward")

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        """The micro-batches of a step."""
        if self._phase != "forward_backward":
            self.enter("forward_backward")

    def on_pre_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        """Gradients are complete and clipped."""
        self.enter("optimizer")


def _reset_peaks(device: str) -> None:
    """Let the counters of peaks start from what is in use now."""
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
