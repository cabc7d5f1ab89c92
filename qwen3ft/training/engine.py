"""One training attempt, from a plan and a prepared model to an outcome.

`QATrainer`, a subclass of transformers' Trainer, runs the loop. The plan is final: nothing here
decides about sizes or rates.
"""

from __future__ import annotations

import gc
import shutil
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from transformers import TrainingArguments

from qwen3ft.disk.manifests import find_damage
from qwen3ft.errors import CheckpointCorruptError, TrainingFailureError
from qwen3ft.faults import planted_faults, reach
from qwen3ft.jobs.folders import JobDir, RunDir
from qwen3ft.jobs.heartbeat import Heartbeat, StopRequest
from qwen3ft.logs import get_logger
from qwen3ft.model.adapter_checks import ADAPTER_CONFIG_FILE, ADAPTER_FILE
from qwen3ft.records.plan import TrainPlan
from qwen3ft.records.training import AttemptOutcome, RankOutcome
from qwen3ft.text.commands import shell_line
from qwen3ft.training import checkpoint
from qwen3ft.training.callbacks import ProgressCallback, StopOnRequest
from qwen3ft.training.checkpoint_writer import read_adapter_files
from qwen3ft.training.leak_watch import LeakWatch
from qwen3ft.training.planted import FaultCallback
from qwen3ft.training.progress import is_over, is_patience_spent
from qwen3ft.training.trainer import QATrainer

if TYPE_CHECKING:
    from datasets import Dataset, DatasetDict
    from peft import PeftModel
    from transformers import DataCollator

    from qwen3ft.machine.memory import MemoryOptimizer
    from qwen3ft.training.ranks import Ranks

logger = get_logger("train")


class TrainingEngine:
    """Execution of `plan` in the attempt folder `job`.

    Args:
        plan: The attempt.
        job: Its folder; of a rank above 0, which writes neither checkpoints nor metrics, its own.
        collator: Collator of padded micro-batches.
        memory: Memory of this process.
        stop: Set when this process is asked to stop.
        ranks: The processes that share the attempt; None if this one is alone.
    """

    def __init__(
        self,
        plan: TrainPlan,
        job: JobDir,
        *,
        collator: DataCollator,
        memory: MemoryOptimizer,
        stop: StopRequest | None = None,
        ranks: Ranks | None = None,
    ) -> None:
        self.plan = plan
        self.job = job
        self.collator = collator
        self.stop = stop or StopRequest()
        self.ranks = ranks
        self.memory = memory
        writes = ranks is None or ranks.rank == 0
        self.progress = ProgressCallback(
            job, Heartbeat(job.heartbeat), memory, memory_only=not writes
        )
        # Not `stop`, which breaks an evaluation off: a leak ends the attempt after it.
        self.leak_stop = StopRequest()
        self.leak_watch = LeakWatch(
            memory,
            job.memory_report,
            stop=self.leak_stop if ranks else None,
            graphs=plan.memory.graphs,
        )
        self._started = time.monotonic()

    def create_training_args(self) -> TrainingArguments:
        """Return the plan as transformers' arguments."""
        plan = self.plan
        return TrainingArguments(
            output_dir=str(self.job.path),
            # An item of the data loader is a whole step; the trainer splits it into micro-batches.
            per_device_train_batch_size=plan.effective_batch_size,
            gradient_accumulation_steps=1,
            per_device_eval_batch_size=plan.memory.eval_batch_size,
            max_steps=plan.total_steps,
            learning_rate=plan.learning_rate,
            lr_scheduler_type=plan.lr_scheduler,
            warmup_steps=plan.warmup_steps,
            weight_decay=plan.weight_decay,
            max_grad_norm=plan.max_grad_norm,
            # Fused: it can skip a step without a wait (`found_inf`). Not paged: the moments take
            # 0.1 GB at rank 6, and bitsandbytes ends the process when it cannot page.
            optim="adamw_torch_fused" if plan.device == "cuda" else "adamw_torch",
            use_cpu=plan.device == "cpu",
            eval_strategy="steps",
            eval_steps=plan.evaluate_every_steps,
            eval_on_start=plan.resume_from is None,  # the loss before training, for the report
            save_strategy="steps",
            save_steps=plan.evaluate_every_steps,  # the best evaluation has a checkpoint
            metric_for_best_model="eval_loss",
            greater_is_better=False,
            logging_steps=1,
            logging_nan_inf_filter=False,  # it would replace a NaN by the mean of earlier losses
            seed=plan.seed,
            remove_unused_columns=False,  # the collator reads more than forward takes
            dataloader_pin_memory=plan.device == "cuda",
            disable_tqdm=True,
            report_to=[],  # the flow's process sends metrics on
        )

    def create_trainer(
        self, model: PeftModel, dataset: DatasetDict, args: TrainingArguments
    ) -> QATrainer:
        """Create the trainer with this project's callbacks.

        Args:
            model: Base model with its adapter, ready for training.
            dataset: Splits 'train' and 'dev' with input_ids, length, and trained or labels.
            args: Result of `create_training_args`.
        """
        from transformers import PrinterCallback

        rank = self.ranks.rank if self.ranks else 0
        faults = [fault for fault in planted_faults() if fault.is_for(self.plan.attempt, rank)]
        trainer = QATrainer(
            model=model,
            args=args,
            train_dataset=_rows(dataset["train"]),
            eval_dataset=_rows(dataset["dev"]),
            data_collator=self.collator,
            plan=self.plan,
            job=self.job,
            stop=self.stop,
            leak_stop=self.leak_stop,
            ranks=self.ranks,
        )
        callbacks: list[Any] = [
            self.progress,
            StopOnRequest(self.stop, trainer.agreed_stop),
            self.leak_watch,
            *([FaultCallback(faults)] if faults else []),
        ]
        for callback in callbacks:
            trainer.add_callback(callback)
        trainer.remove_callback(PrinterCallback)  # it prints the numbers of every step
        self.progress.trainer = trainer
        return trainer

    def train_model(self, trainer: QATrainer) -> QATrainer:
        """Train to the end of the plan or to early stopping.

        Raises:
            PreemptedError: a signal asked to stop; a checkpoint was saved.
            DivergedError: gradients were not finite; the weights are unchanged.
            OutOfMemoryError: the process exceeded its budget.
            MemoryLeakError: memory kept growing and would have run out; a checkpoint was saved.
        """
        if self.plan.resume_from:
            logger.info("resuming from %s", self.plan.resume_from)
        # Exempt what exists now, which stays, from each later garbage collection.
        gc.collect()
        gc.freeze()
        try:
            trainer.train(resume_from_checkpoint=self.plan.resume_from)
        except BaseException:  # nothing may end while a checkpoint is being written
            try:
                trainer.writer.wait()
            except OSError as error:  # recovery decides by the error that ended training
                logger.error("the last checkpoint could not be written: %s", error)
            raise
        finally:
            gc.unfreeze()
        trainer.writer.wait()
        reach("training.over")
        is_finished = is_over(trainer.state, self.plan.early_stopping_patience)
        if trainer.agreed_stop.signal_name is not None and not is_finished:
            raise trainer.agreed_stop.error()
        return trainer

    def save_model(self, trainer: QATrainer, output_dir: str) -> None:
        """Copy the best checkpoint's adapter, or else the present one, into `output_dir`.

        Raises:
            CheckpointCorruptError: the checkpoint is missing or damaged.
        """
        folder = Path(output_dir)
        folder.mkdir(parents=True, exist_ok=True)
        if trainer.state.best_global_step:
            best = self._checkpoint_of(trainer.state.best_global_step)
            for name in (ADAPTER_FILE, ADAPTER_CONFIG_FILE):
                shutil.copy2(best.path / name, folder / name)
        else:
            read_adapter_files(trainer.model)(folder)

    def rank_outcome(self) -> RankOutcome:
        """Return what a rank above 0 alone knows."""
        _, _, process_gb = self.memory.peak()
        assert self.ranks is not None
        return RankOutcome(
            peak_memory_gb=process_gb,
            exchange_ms=self.ranks.exchange_ms,
            computing_ms=self.ranks.computing_ms,
            launch_bound_share=self.ranks.launch_bound_share,
        )

    def outcome(self, trainer: QATrainer) -> AttemptOutcome:
        """Return the result of the attempt.

        Raises:
            TrainingFailureError: training ended without an evaluation.
        """
        state = trainer.state
        held_out = [entry["eval_loss"] for entry in state.log_history if "eval_loss" in entry]
        losses = [entry["loss"] for entry in state.log_history if "loss" in entry]
        if state.best_global_step is None or not held_out:
            raise TrainingFailureError(
                f"Training ended at step {state.global_step} without an evaluation.",
                why="The held-out loss was not finite, or there are no held-out rows.",
                next_command=shell_line("tail", "-n", "50", self.job.log),
            )
        allocated_gb, reserved_gb, process_gb = self.memory.peak()
        logger.info(
            "%d readings for leaks took %.1f ms",
            self.leak_watch.readings,
            1000 * self.leak_watch.spent_seconds,
        )
        return AttemptOutcome(
            attempt=self.plan.attempt,
            attempt_dir=str(self.job.path),
            best_checkpoint=str(self._checkpoint_of(state.best_global_step).path),
            best_step=state.best_global_step,
            best_held_out_loss=state.best_metric,
            first_held_out_loss=held_out[0],
            last_step=state.global_step,
            epochs=state.epoch or 0.0,
            final_loss=losses[-1] if losses else None,
            stopped_early=is_patience_spent(state, self.plan.early_stopping_patience),
            peak_memory_gb=process_gb,
            peak_allocated_gb=allocated_gb,
            peak_reserved_gb=reserved_gb,
            tokens_per_second=self.progress.trained_tokens
            / max(self.progress.trained_seconds, 1e-9),
            seconds=time.monotonic() - self._started,
            rank_exchange_ms=(self.ranks.exchange_ms,) if self.ranks else (),
            rank_computing_ms=(self.ranks.computing_ms,) if self.ranks else (),
            rank_launch_bound_share=(self.ranks.launch_bound_share,) if self.ranks else (),
        )

    def _checkpoint_of(self, step: int) -> checkpoint.Checkpoint:
        """Return the verified checkpoint of `step`, from this attempt or an earlier one."""
        folders = [job.checkpoints for job in RunDir(Path(self.plan.run_dir)).attempts()]
        candidates = [c for c in checkpoint.list_checkpoints(folders) if c.step == step]
        for candidate in reversed(candidates):
            if find_damage(candidate.path) is None:
                return candidate
        raise CheckpointCorruptError(
            f"The best checkpoint (step {step}) is missing or damaged.",
            why="Its files do not match their manifest.",
            next_command=shell_line("ls", "-l", self.job.checkpoints),
            step=step,
        )


def _rows(split: Dataset) -> Dataset:
    """Return the columns that the trainer reads; `length` determines the order."""
    targets = "trained" if "trained" in split.column_names else "labels"
    return split.select_columns(["input_ids", targets, "length"])
