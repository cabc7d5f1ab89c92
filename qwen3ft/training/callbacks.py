"""What happens around the steps of an attempt: metrics, heartbeat, early stopping, stopping."""

from __future__ import annotations

import time
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from qwen3ft.files import append_json_line
from qwen3ft.logs import get_logger
from qwen3ft.records.training import MemoryStatus, TrainingMetrics
from qwen3ft.training.faults import Fault, strike

if TYPE_CHECKING:
    from qwen3ft.jobs.folders import JobDir
    from qwen3ft.jobs.heartbeat import Heartbeat, StopRequest
    from qwen3ft.machine.memory import MemoryOptimizer
    from qwen3ft.training.trainer import QATrainer

logger = get_logger("train")

LOG_EVERY_SECONDS = 5.0
MEASURE_MEMORY_EVERY_SECONDS = 1.0
"""Asking NVML and the allocator at every step would take several per cent of a fast one."""


class ProgressCallback(TrainerCallback):
    """Writes metrics.jsonl, memory.jsonl and the heartbeat; one readable line every few seconds."""

    def __init__(self, job: JobDir, heartbeat: Heartbeat, memory: MemoryOptimizer) -> None:
        self.job = job
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

    def on_epoch_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        """Give the sampler the epoch that is really next, also after a resume in its middle."""
        assert self.trainer is not None
        steps_per_epoch = -(-len(self.trainer.order) // self.trainer.plan.effective_batch_size)
        self.trainer.order.epoch = state.global_step // steps_per_epoch
        if not self._tokens:  # else steps of the epoch before are still on the device
            self._clock = time.perf_counter()

    def on_substep_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        """A micro-batch is done."""
        self.heartbeat.beat("train", state.global_step)

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        """An optimizer step is queued; evaluate and save after the last one too."""
        assert self.trainer is not None
        self.heartbeat.beat("train", state.global_step)
        self._tokens[state.global_step] = self.trainer.step_tokens
        self.memory.enforce_budget()
        if state.global_step >= state.max_steps:
            control.should_evaluate = control.should_save = True

    def on_prediction_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        """A held-out batch is done."""
        self.heartbeat.beat("evaluate", state.global_step)

    def on_evaluate(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        """The evaluation is over: what fails from here on fails in training."""
        self.heartbeat.beat("train", state.global_step)
        self._clock = time.perf_counter()

    def on_save(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        """A checkpoint is copied, and on a GPU still being written."""
        self._clock = time.perf_counter()

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, float] | None = None,
        **_: Any,
    ) -> None:
        """Append what was measured; the summary at the end of training is not a step.

        A step's time is that from the numbers of the step before to its own: they are read in the
        order of the steps, when each is really done.
        """
        if not logs or not ({"loss", "eval_loss"} & logs.keys()):
            return
        step, tokens_per_second = int(logs["step"]), None
        if "loss" in logs:
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
        append_json_line(self.job.metrics, metrics.model_dump(mode="json"))
        append_json_line(
            self.job.memory,
            {
                **status.model_dump(),
                "step": step,
                "timestamp": datetime.now(UTC).isoformat(),
            },
        )
        self._say(metrics, state, status)

    def _memory_status(self) -> MemoryStatus:
        """Memory at this moment, or not long ago."""
        now = time.monotonic()
        if self._memory is None or now - self._measured >= MEASURE_MEMORY_EVERY_SECONDS:
            self._memory, self._measured = self.memory.status(), now
        return self._memory

    def _say(self, metrics: TrainingMetrics, state: TrainerState, status: MemoryStatus) -> None:
        if metrics.held_out_loss is not None:
            logger.info("step %d: held-out loss %.4f", metrics.step, metrics.held_out_loss)
        elif time.monotonic() - self._last_line >= LOG_EVERY_SECONDS:
            self._last_line = time.monotonic()
            logger.info(
                "step %d/%d  epoch %.2f  loss %.4f  %.0f tok/s  memory %.2f of %.1f GB",
                metrics.step,
                state.max_steps,
                metrics.epoch,
                metrics.loss,
                metrics.tokens_per_second or 0.0,
                status.cached_gb,
                status.total_gb,
            )


class EarlyStopping(TrainerCallback):
    """Stops after `patience` evaluations without a lower held-out loss.

    The count follows from the log history, which checkpoints carry, so a resumed run stops where an
    undisturbed one would.
    """

    def __init__(self, patience: int) -> None:
        self.patience = patience
        self.stopped = False

    def on_evaluate(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        metrics: dict[str, float],
        **_: Any,
    ) -> None:
        """Decide; the trainer updates the best value only after this."""
        if state.best_metric is None or metrics["eval_loss"] < state.best_metric:
            return
        since_best = sum(
            1
            for entry in state.log_history
            if "eval_loss" in entry and entry["step"] > (state.best_global_step or 0)
        )
        if since_best >= self.patience:
            self.stopped = control.should_training_stop = True


class StopOnRequest(TrainerCallback):
    """Turns a stop request into a checkpoint and an orderly end."""

    def __init__(self, request: StopRequest) -> None:
        self.request = request

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        """Save, then stop."""
        if self.request.signal_name is not None:
            control.should_evaluate = False
            control.should_save = control.should_training_stop = True

    def on_prediction_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        """Between checkpoints there is nothing to save in an evaluation: stop at once."""
        if self.request.signal_name is not None:
            raise self.request.error()


class FaultCallback(TrainerCallback):
    """Lets planted faults strike; installed only where the environment asks for them."""

    def __init__(self, faults: list[Fault]) -> None:
        self.faults = faults

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Strike before the step that a fault names."""
        for fault in self.faults:
            if fault.is_due(state.global_step + 1):
                if fault.step == state.global_step + 1:
                    logger.warning("planted fault %s strikes at step %d", fault.action, fault.step)
                strike(fault, kwargs["model"])
