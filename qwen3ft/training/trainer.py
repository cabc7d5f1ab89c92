"""transformers' Trainer, adapted for packed rows, a token-weighted loss and exact resuming.

- The loss is the summed negative log-likelihood over the number of trained tokens in the effective
  batch, so its split into micro-batches does not change the gradient.
- The order of sequences depends only on seed and epoch.
- Non-finite gradients raise DivergedError before they change the weights.
- Forward and backward are those of transformers and PEFT, or of `qwen3ft.training.fused`.
- Checkpoints are committed whole, without pickle, and restore every bit. A step that was
  interrupted before its evaluation or its end is finished first, so that a resumed run ends as an
  undisturbed one does, wherever it was interrupted.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import asdict
from itertools import chain, islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from transformers import Trainer, TrainerControl

from qwen3ft.errors import DivergedError, PreemptedError, RanksPartedError
from qwen3ft.faults import reach
from qwen3ft.jobs.folders import RunDir
from qwen3ft.planning.fused_sizes import MOST_GRAPHS
from qwen3ft.training import checkpoint
from qwen3ft.training.batches import (
    EffectiveBatchOrder,
    MicroBatch,
    PackedCollator,
    real_tokens,
    step_loader,
    step_sampler,
    trained_tokens,
)
from qwen3ft.training.checkpoint_writer import (
    CheckpointWriter,
    load_adapter,
    load_optimizer_state,
    load_rng_state,
)
from qwen3ft.training.fused import fused_step
from qwen3ft.training.fused.graphs import RowSize, row_size
from qwen3ft.training.host_optimizer import HostAdamW
from qwen3ft.training.late_metrics import DelayedMetrics
from qwen3ft.training.loss import summed_loss
from qwen3ft.training.progress import is_over, lacks_evaluation

if TYPE_CHECKING:
    from torch.utils.data import DataLoader

    from qwen3ft.jobs.folders import JobDir
    from qwen3ft.jobs.heartbeat import StopRequest
    from qwen3ft.records.plan import TrainPlan
    from qwen3ft.training.fused.step import FusedStep
    from qwen3ft.training.ranks import Ranks

STEPS_TO_RECORD = 200
"""Steps whose rows' graphs are recorded before the first of them."""

KEPT_ENTRIES = 200
"""Newest entries of the log history to keep at least, besides all evaluations. The entries of
10,000 steps would take 3 MiB of memory and 1.5 MB of each checkpoint; metrics.jsonl has them."""


class QATrainer(Trainer):
    """The Trainer of one attempt, by `plan`, in the folder `job`.

    Args:
        plan: The attempt.
        job: Its folder.
        ranks: The processes that share each step, this one among them; None if it is alone.
        stop: Set when this process was asked to stop; the ranks tell each other before each step.
        leak_stop: Set when memory of this rank leaks; the ranks tell each other likewise.
    """

    control: TrainerControl
    data_collator: Any
    _globalstep_last_logged: int

    def __init__(
        self,
        *args: Any,
        plan: TrainPlan,
        job: JobDir,
        stop: StopRequest,
        leak_stop: StopRequest,
        ranks: Ranks | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(*args, **kwargs)
        self.plan = plan
        self.ranks = ranks
        self.stop = stop
        self.leak_stop = leak_stop
        self.agreed_stop = stop if ranks is None else type(stop)()
        self.writer = CheckpointWriter(
            job.checkpoints,
            plan.keep_checkpoints,
            background=plan.device == "cuda",
            logs=(job.metrics, job.memory),
        )
        self.step_tokens = 0
        # On a GPU metrics are read one step late, so that it never waits for the host.
        self.late = DelayedMetrics(lag=1 if plan.device == "cuda" else 0)
        self.fused: FusedStep | None = None
        if plan.memory.kernels == "fused":
            self.fused = fused_step(self.accelerator.unwrap_model(self.model), plan)
            self.data_collator = PackedCollator(self.data_collator.pad_token_id, plan.memory.graphs)
        self._trained = [p for p in self.model.parameters() if p.requires_grad]
        # transformers calls it at each step, and the model's own walks through 3,000 modules.
        self.model.zero_grad = self._forget_gradients
        self._weights = plan.model.shape.linear_parameters + plan.adapter.trainable_parameters
        self.model_accepts_loss_kwargs = True  # compute_loss divides by the whole batch's tokens
        self.order = EffectiveBatchOrder(
            self.train_dataset.with_format("numpy")["length"][:],
            plan.effective_batch_size,
            plan.seed,
        )
        self.sampler: Any = step_sampler(self.order, plan, ranks.rank if ranks else None)

    def create_optimizer(self, *args: Any, **kwargs: Any) -> torch.optim.Optimizer:
        """Create torch's AdamW, or the one that keeps its moments in host memory."""
        given: Any = getattr(self, "optimizer", None)
        if self.plan.memory.offload_optimizer and given is None:
            self.optimizer: Any = HostAdamW.from_arguments(self._trained, self.args)
        optimizer: torch.optim.Optimizer = super().create_optimizer(*args, **kwargs)
        return optimizer

    def get_train_dataloader(self) -> DataLoader[Any]:
        """Return the loader of steps, each a list of micro-batches in host memory."""
        # To transformers an item is one batch without accumulation, so its count of steps, and the
        # steps that it skips on a resume, are exact.
        collate: Any = self.data_collator
        if self.fused is None and self.plan.memory.packing:
            collate = PackedCollator(collate.pad_token_id)
        pin_memory = self.args.dataloader_pin_memory
        loader = step_loader(self.train_dataset, self.sampler, collate, pin_memory=pin_memory)
        # Not placed: the step as a whole would go to the device, not a micro-batch at a time.
        return self.accelerator.prepare_data_loader(loader, device_placement=False)  # type: ignore[no-any-return]

    def get_batch_samples(
        self, epoch_iterator: Iterator[list[MicroBatch]], num_batches: int, device: torch.device
    ) -> tuple[list[list[MicroBatch]], int]:
        """Return the next step and its number of trained tokens."""
        steps = list(islice(epoch_iterator, num_batches))
        batches = [batch for step in steps for batch in step]
        if self.ranks is not None:
            own_reason = self.stop.signal_name or self.leak_stop.signal_name
            self._beat()
            totals = self.ranks.share_step(batches, wants_stop=own_reason is not None)
            if totals.must_stop:
                self.agreed_stop.signal_name = own_reason or "as another rank was"
            self.step_tokens = totals.real_tokens
            return steps, totals.trained_tokens
        self.step_tokens = sum(map(real_tokens, batches))
        # The count stays a plain number: copying a tensor to the device would wait for it.
        return steps, sum(map(trained_tokens, batches))

    def training_step(
        self,
        model: torch.nn.Module,
        inputs: list[MicroBatch],
        num_items_in_batch: torch.Tensor | int | None = None,
    ) -> torch.Tensor:
        """Run forward and backward of each micro-batch; return the mean loss per trained token.

        Loss and gradients are those of the micro-batches of all ranks.
        """
        if self.ranks is not None:
            # A checkpoint has the generators of one rank. So no rank needs its own restored, and no
            # two ranks drop the same elements.
            torch.manual_seed(_seed_of(self.plan.seed, self.state.global_step, self.ranks.rank))
        total = torch.zeros((), device=self.args.device)
        for index, batch in enumerate(inputs):
            if index:
                self._beat()
            total += self._micro_step(model, batch, num_items_in_batch)
        if self.ranks is None:
            return total
        self._beat()
        return self.ranks.sum_gradients(self._trained, total)

    def record_graphs(self) -> None:
        """Record the CUDA graphs of the rows of the next steps, longest rows first.

        Before these steps, so that memory that does not suffice runs out at once, and several
        ranks record at the same time instead of waiting for each other.
        """
        if self.fused is not None and self.plan.memory.graphs:
            self.fused.record(self.sizes_of_next_steps())

    def sizes_of_next_steps(self) -> list[RowSize]:
        """Return the sizes of rows with graphs of the steps that come, longest rows first.

        They are those of `STEPS_TO_RECORD` steps at most, without rare ones if there are more than
        `MOST_GRAPHS`.
        """
        done, of_epoch = self.state.global_step, len(self.sampler)
        end = min(done + STEPS_TO_RECORD, self.plan.total_steps)
        lengths, sizes = self.order.lengths, Counter[RowSize]()
        while done < end:
            self.order.epoch = done // of_epoch
            first = done % of_epoch
            steps = islice(self.sampler, first, first + end - done)
            sizes.update(row_size(lengths[row].tolist()) for row in chain.from_iterable(steps))
            done += of_epoch - first
        return sorted((size for size, _ in sizes.most_common(MOST_GRAPHS)), reverse=True)

    def _beat(self) -> None:
        """Give a sign of life, as after a micro-batch.

        Ranks also give one before they wait for each other: then the process that hangs has the
        oldest, and the stall names it.
        """
        self.control = self.callback_handler.on_substep_end(self.args, self.state, self.control)

    def _micro_step(
        self, model: torch.nn.Module, batch: MicroBatch, trained: torch.Tensor | int | None
    ) -> torch.Tensor:
        """Run forward and backward of one micro-batch; return its share of the step's loss."""
        if self.fused is None:
            plain: torch.Tensor = super().training_step(model, batch, trained)
            return plain
        # Not super().training_step, which walks all modules to put them into training mode.
        loss = self.compute_loss(model, batch, num_items_in_batch=trained)
        self.accelerator.backward(loss)
        return loss.detach()

    def _forget_gradients(self, set_to_none: bool = True) -> None:
        """Drop the gradients of the adapter; nothing else has any."""
        for parameter in self._trained:
            parameter.grad = None

    def _clip_grad_norm(self, model: torch.nn.Module) -> torch.Tensor:
        """Clip only adapter parameters; nothing else has gradients."""
        return torch.nn.utils.clip_grad_norm_(self._trained, self.args.max_grad_norm)

    def _prepare_inputs(self, inputs: MicroBatch) -> MicroBatch:
        """Copy a micro-batch to the device, without waiting for its queued work."""
        if self.fused is not None:
            return inputs  # it copies them itself
        return {
            name: value.to(self.args.device, non_blocking=True)
            if isinstance(value, torch.Tensor)
            else value
            for name, value in inputs.items()
        }

    def floating_point_ops(self, inputs: list[MicroBatch]) -> int:
        """Return 6 per token and weight of the blocks (Kaplan et al. 2020, arXiv:2001.08361)."""
        # transformers' own method walks all parameters to count them at each call.
        tokens: int = sum(batch["input_ids"].numel() for batch in inputs)
        return 6 * self._weights * tokens

    def compute_loss(
        self,
        model: torch.nn.Module,
        inputs: MicroBatch,
        return_outputs: bool = False,
        num_items_in_batch: torch.Tensor | int | None = None,
    ) -> torch.Tensor:
        """Return a micro-batch's share of the effective batch's mean loss per trained token."""
        assert num_items_in_batch is not None
        return self._summed_loss(inputs) / num_items_in_batch

    def _summed_loss(self, inputs: MicroBatch) -> torch.Tensor:
        if self.fused is not None:
            return self.fused(inputs)
        offload = self.plan.memory.offload_activations and torch.is_grad_enabled()
        on_host = torch.autograd.graph.save_on_cpu(pin_memory=True) if offload else nullcontext()
        with self._autocast(), on_host:
            return summed_loss(
                self.accelerator.unwrap_model(self.model).get_base_model(),
                inputs,
                self.plan.memory.loss_chunk_tokens,
            )

    def _autocast(self) -> torch.autocast:
        """Return autocast to bf16 for products with fp32 adapters, if the model is in bf16."""
        return torch.autocast(
            self.args.device.type,
            dtype=torch.bfloat16,
            enabled=self.plan.model.compute_dtype == "bfloat16",
        )

    def _get_grad_norm(self, model: torch.nn.Module, grad_norm: Any = None) -> torch.Tensor:
        """Return the gradient norm; if it is not finite, the optimizer skips this update.

        Raises:
            DivergedError: on a CPU, at once; on a GPU it is raised when the norm is read.
        """
        norm = torch.as_tensor(super()._get_grad_norm(model, grad_norm=grad_norm))
        if norm.is_cuda:
            # Torch's fused AdamW skips the update if this is 1, as with loss scaling.
            _innermost(self.optimizer).found_inf = (~norm.isfinite()).float()  # type: ignore[attr-defined]
        else:
            self._require_finite(float(norm), self.state.global_step + 1)
        return norm

    def _require_finite(self, norm: float, step: int) -> None:
        if not math.isfinite(norm):
            raise DivergedError(
                f"The gradient norm at step {step} is {norm}.",
                why="The learning rate is too high, or a row drives the loss out of range.",
                next_command=RunDir(Path(self.plan.run_dir)).command_to_train_again(
                    learning_rate=self.plan.learning_rate / 2
                ),
                step=step,
                learning_rate=self.plan.learning_rate,
            )

    def _maybe_log_save_evaluate(
        self, tr_loss: torch.Tensor, grad_norm: Any, *args: Any, **kwargs: Any
    ) -> None:
        """Log the metrics that have arrived, or all before an evaluation or a checkpoint.

        Then evaluate, save and stop, as far as the callbacks ask for it.

        Raises:
            DivergedError: a step's gradients were not finite; its update was skipped.
            PreemptedError: an evaluation was broken off by a stop request; a checkpoint was saved.
            RanksPartedError: another rank ended in an evaluation; a checkpoint was saved.
        """
        step = self.state.global_step
        if self.control.should_log and step > self._globalstep_last_logged:
            rate = kwargs["learning_rate"]
            self.late.put(step, self.state.epoch or 0.0, rate, tr_loss, grad_norm)
            tr_loss.zero_()
            self._globalstep_last_logged = step
            self.store_flos()
        self.control.should_log = False  # super() would read the loss, and wait for it
        due = self.control.should_evaluate or self.control.should_save
        self._log_late(everything=due or self.control.should_training_stop)
        self._evaluate_and_save()

    def finish_step(self) -> None:
        """Do what is left of the step whose checkpoint was loaded."""
        assert self.plan.resume_from is not None
        load_rng_state(Path(self.plan.resume_from))  # a checkpoint that is saved now has it again
        self.control.should_evaluate = lacks_evaluation(self.state)
        self._evaluate_and_save()

    def _evaluate_and_save(self) -> None:
        if self.control.should_evaluate:
            try:
                metrics = self._evaluate(None, None)
            except (PreemptedError, RanksPartedError):
                # A rank that was asked to stop may part while this one waits for its losses.
                self._save_checkpoint(self.model, None)
                raise
            reach("evaluation.logged")
            self._determine_best_metric(metrics, None)
            reach("evaluation.marked")
            self.control.should_save = True
        if self.control.should_save:
            self._save_checkpoint(self.model, None)
            self.control = self.callback_handler.on_save(self.args, self.state, self.control)
        if is_over(self.state, self.plan.early_stopping_patience):
            self.control.should_training_stop = True

    def _run_epoch(self, *args: Any, **kwargs: Any) -> None:
        """Train an epoch, unless a resumed training was over; transformers would go on."""
        if not self.control.should_training_stop:
            super()._run_epoch(*args, **kwargs)

    def _log_late(self, *, everything: bool) -> None:
        for numbers in self.late.take(everything=everything):
            self._require_finite(numbers.grad_norm, numbers.step)
            self._total_loss_scalar += numbers.loss
            self.log(asdict(numbers))

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Record `logs` and call the callbacks; step and epoch default to the present ones."""
        output = {"epoch": self.state.epoch, "step": self.state.global_step, **logs}
        history = self.state.log_history
        history.append(output)
        if len(history) % KEPT_ENTRIES == 0:
            evaluations = [entry for entry in history[:-KEPT_ENTRIES] if "eval_loss" in entry]
            history[:] = evaluations + history[-KEPT_ENTRIES:]
        self.control = self.callback_handler.on_log(self.args, self.state, self.control, output)

    def evaluate(
        self,
        eval_dataset: Any = None,
        ignore_keys: list[str] | None = None,
        metric_key_prefix: str = "eval",
    ) -> dict[str, float]:
        """Return the mean negative log-likelihood per trained token over the held-out rows."""
        parts: list[tuple[float, int]] = []
        # The phase is named before the first batch can run out of memory.
        self.callback_handler.on_prediction_step(self.args, self.state, self.control)
        self.model.eval()
        # A data loader draws a seed. What follows must not depend on when an evaluation was made.
        with torch.random.fork_rng(devices=[]), torch.no_grad():
            for inputs in self.get_eval_dataloader(self._own_rows(eval_dataset)):
                loss = self._summed_loss(self._prepare_inputs(inputs)).item()
                parts.append((loss, trained_tokens(inputs)))
                self.callback_handler.on_prediction_step(self.args, self.state, self.control)
        self.model.train()
        if self.ranks is not None:
            rows = len(self.eval_dataset if eval_dataset is None else eval_dataset)
            parts = self.ranks.merge(parts, -(-rows // self.args.per_device_eval_batch_size))
        loss_sum, tokens = 0.0, 0
        for loss, trained in parts:  # in the order of batches, so that ranks do not change the sum
            loss_sum += loss
            tokens += trained
        metrics = {f"{metric_key_prefix}_loss": loss_sum / max(tokens, 1)}
        self.log(metrics)
        self.control = self.callback_handler.on_evaluate(
            self.args, self.state, self.control, metrics
        )
        return metrics

    def _own_rows(self, given: Any) -> Any:
        """Return the held-out rows of this rank: every batch is one rank's, in turn."""
        if self.ranks is None:
            return given
        rows, size = self.eval_dataset if given is None else given, self.ranks.size
        batch = self.args.per_device_eval_batch_size
        return rows.select([i for i in range(len(rows)) if i // batch % size == self.ranks.rank])

    def _save_checkpoint(self, model: torch.nn.Module, trial: Any) -> None:
        if self.ranks is not None and self.ranks.rank > 0:
            return  # it has the same state
        facts = {**checkpoint.lineage(self.plan), "learning_rate": self.plan.learning_rate}
        optimizer = _innermost(self.optimizer)
        self.writer.save(self.model, optimizer, self.lr_scheduler, self.state, facts)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        load_adapter(Path(resume_from_checkpoint), self.model)

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        if checkpoint is not None:
            optimizer, rate = _innermost(self.optimizer), self.plan.learning_rate
            load_optimizer_state(Path(checkpoint), optimizer, self.lr_scheduler, rate)

    def _load_rng_state(self, checkpoint: str | None) -> None:
        if checkpoint is not None:
            load_rng_state(Path(checkpoint))


def _seed_of(seed: int, step: int, rank: int) -> int:
    return int(np.random.SeedSequence((seed, step, rank)).generate_state(1)[0])


def _innermost(optimizer: Any) -> torch.optim.Optimizer:
    """Return the torch optimizer inside accelerate's wrapper."""
    return getattr(optimizer, "optimizer", optimizer)  # type: ignore[no-any-return]
