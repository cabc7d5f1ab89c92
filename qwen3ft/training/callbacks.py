"""Callbacks of an attempt: metrics and heartbeat, and stop requests."""

from __future__ import annotations

import time
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from qwen3ft.disk.files import append_json_line
from qwen3ft.faults import reach
from qwen3ft.logs import PROGRESS_LOGGER, ROOT, get_logger
from qwen3ft.records.training import MemoryStatus, TrainingMetrics

if TYPE_CHECKING:
    from qwen3ft.jobs.folders import JobDir
    from qwen3ft.jobs.heartbeat import Heartbeat, StopRequest
    from qwen3ft.machine.memory import MemoryOptimizer
    from qwen3ft.training.trainer import QATrainer

logger = get_logger("train")
progress_logger = get_logger(PROGRESS_LOGGER.removeprefix(f"{ROOT}."))

LOG_EVERY_SECONDS = 5.0
MEASURE_MEMORY_EVERY_SECONDS = 1.0
"""Asking NVML and the allocator at every step would cost several per cent of a fast step."""


class ProgressCallback(TrainerCallback):
    """Recorder of metrics.jsonl, memory.jsonl and the heartbeat; logs a line every few seconds.

    Args:
        job: Folder of the files.
        heartbeat: The sign of life.
        memory: Memory of this process.
        memory_only: Record no metrics, which another rank does.
    """

    def __init__(
        self,
        job: JobDir,
        heartbeat: Heartbeat,
        memory: MemoryOptimizer,
        *,
        memory_only: bool = False,
    ) -> None:
        self.job = job
        self.memory_only = memory_only
        self.heartbeat = heartbeat
        self.memory = memory
        self.trainer: QATrainer | None = None
        self.trained_seconds = 0.0
        self.trained_tokens = 0
        self._clock = time.perf_counter()
        self._tokens: dict[int, int] = {}
        self._last_line = 0.0
        self._memory: MemoryStatus | None = None
        self._measured = 0.0

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        """Record graphs, and have a resumed trainer finish the step that it resumes from."""
        assert self.trainer is not None
        self.heartbeat.beat("train", state.global_step)  # where memory runs out in a recording
        self.trainer.record_graphs()
        if self.trainer.plan.resume_from is not None:
            self.trainer.finish_step()

    def on_epoch_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        """Set the sampler's epoch, also after a resume in the middle of one."""
        assert self.trainer is not None
        steps_per_epoch = -(-len(self.trainer.order) // self.trainer.plan.effective_batch_size)
        self.trainer.order.epoch = state.global_step // steps_per_epoch
        if not self._tokens:  # otherwise steps of the last epoch are still on the device
            self._clock = time.perf_counter()

    def on_substep_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        """Beat after a micro-batch."""
        self.heartbeat.beat("train", state.global_step)

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        """Beat and check the budget after a step."""
        assert self.trainer is not None
        reach("step.done")
        self.heartbeat.beat("train", state.global_step)
        self._tokens[state.global_step] = self.trainer.step_tokens
        self.memory.enforce_budget()

    def on_prediction_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        """Beat after a held-out batch."""
        self.heartbeat.beat("evaluate", state.global_step)
        reach("evaluation.begun")

    def on_evaluate(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        """Return to the training phase after an evaluation."""
        # Recovery goes by the phase: if memory ran out in the next step, and this still said
        # "evaluate", it would shrink evaluation batches in vain.
        self.heartbeat.beat("train", state.global_step)
        self._clock = time.perf_counter()

    def on_save(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        """Exclude the time of a checkpoint from that of a step."""
        self._clock = time.perf_counter()

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, float] | None = None,
        **_: Any,
    ) -> None:
        """Append the metrics of a step or an evaluation."""
        if not logs or not ({"loss", "eval_loss"} & logs.keys()):
            return  # the summary at the end of training
        step, tokens_per_second = int(logs["step"]), None
        if "loss" in logs:
            # A step's metrics arrive when it is really done, so its time is from the last arrival.
            now = time.perf_counter()
            seconds, tokens = now - self._clock, self._tokens.pop(step, 0)
            self._clock = now
            self.trained_seconds += seconds
            self.trained_tokens += tokens
            tokens_per_second = tokens / max(seconds, 1e-9)
        status = self._memory_status()
        metrics = TrainingMetrics(
            epoch=logs["epoch"] or 0.0,
            step=step,
            loss=logs.get("loss"),
            learning_rate=logs.get("learning_rate", 0.0),
            memory_usage=status,
            grad_norm=logs.get("grad_norm"),
            tokens_per_second=tokens_per_second,
            held_out_loss=logs.get("eval_loss"),
        )
        append_json_line(
            self.job.memory,
            {**status.model_dump(), "step": step, "timestamp": datetime.now(UTC).isoformat()},
        )
        if not self.memory_only:
            append_json_line(self.job.metrics, metrics.model_dump(mode="json"))
            self._say(metrics, state, status)

    def _memory_status(self) -> MemoryStatus:
        """Return the memory now, or up to a second ago."""
        now = time.monotonic()
        if self._memory is None or now - self._measured >= MEASURE_MEMORY_EVERY_SECONDS:
            self._memory, self._measured = self.memory.status(), now
        return self._memory

    def _say(self, metrics: TrainingMetrics, state: TrainerState, status: MemoryStatus) -> None:
        if metrics.held_out_loss is not None:
            logger.info("step %d: held-out loss %.4f", metrics.step, metrics.held_out_loss)
        elif time.monotonic() - self._last_line >= LOG_EVERY_SECONDS:
            self._last_line = time.monotonic()
            progress_logger.info(
                "step %d/%d  epoch %.2f  loss %.4f  %.0f tok/s  memory %.2f of %.1f GB",
                metrics.step,
                state.max_steps,
                metrics.epoch,
                metrics.loss,
                metrics.tokens_per_second or 0.0,
                status.cached_gb,
                status.total_gb,
            )


class StopOnRequest(TrainerCallback):
    """Response to a stop request: save a checkpoint, then end.

    Args:
        request: Request to this process, which breaks an evaluation off.
        agreed: Request that all ranks know of, which ends training after a step.
    """

    def __init__(self, request: StopRequest, agreed: StopRequest) -> None:
        self.request = request
        self.agreed = agreed

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        """Have the trainer save and stop; an evaluation that is due comes first after a resume."""
        if self.agreed.signal_name is not None:
            # Who asks to stop kills after a while: only the checkpoint is worth that time.
            control.should_evaluate = False
            control.should_save = control.should_training_stop = True

    def on_prediction_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        """Break an evaluation off, for the trainer to save and stop."""
        if self.request.signal_name is not None:
            raise self.request.error()
