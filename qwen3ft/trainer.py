"""transformers' Trainer with the few changes that this project's promises need.

- The loss is the negative log-likelihood summed over trained tokens, divided by the number of
  trained tokens in the whole effective batch, so every split of it into micro-batches gives the
  same gradient. Logits exist only for trained positions and only `loss_chunk_tokens` at a time.
- One item of the data loader is one optimizer step: the list of its micro-batches, packed rows or
  padded ones (`qwen3ft.packing`, `qwen3ft.batches`). To transformers' Trainer it is one batch
  without accumulation, so its counts of steps, and what it skips on a resume, are exact.
- The order of sequences depends on seed and epoch alone, never on the micro-batches.
- Non-finite gradients raise before the weights are touched.
- Checkpoints are committed whole (`qwen3ft.checkpoint`), without pickle, and restore every bit.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from contextlib import nullcontext
from functools import partial
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from peft import get_peft_model_state_dict, set_peft_model_state_dict
from safetensors.torch import load_file, save_file
from torch.utils.checkpoint import checkpoint as recompute
from torch.utils.data import DataLoader
from transformers import Trainer, TrainerControl

from qwen3ft import checkpoint
from qwen3ft.batches import (
    IGNORED,
    EffectiveBatchOrder,
    MicroBatch,
    PackedCollator,
    StepCollator,
    StepRows,
    StepSampler,
    real_tokens,
    trained_tokens,
)
from qwen3ft.errors import CheckpointCorruptError, DivergedError
from qwen3ft.packing import pack, rows_at_a_time
from qwen3ft.plan import workload_of
from qwen3ft.training_state import load_optimizer_state, load_rng_state, save_training_state

if TYPE_CHECKING:
    from qwen3ft.records import TrainPlan

ADAPTER_NAME = "adapter_model.safetensors"
STATE_NAME = "trainer_state.json"


def summed_loss(model: Any, batch: Mapping[str, torch.Tensor], chunk_tokens: int) -> torch.Tensor:
    """Negative log-likelihood in nats, summed over all positions whose label is not `IGNORED`.

    Args:
        model: A `Qwen3ForCausalLM`, adapters injected or not.
        batch: `input_ids` and `labels` (targets aligned with them), shape (rows, tokens), and
            either `attention_mask` (1 for real tokens, 0 for padding) or `position_ids` (0 where a
            sequence of a packed row begins) of the same shape.
        chunk_tokens: Positions whose logits (chunk, vocabulary) exist at one time; backward
            computes them again instead of keeping them.

    Returns:
        A scalar in fp32.
    """
    labels = batch["labels"]
    hidden = model.model(
        input_ids=batch["input_ids"],
        attention_mask=batch.get("attention_mask"),
        position_ids=batch.get("position_ids"),
        use_cache=False,
    ).last_hidden_state
    trained = labels[:, 1:] != IGNORED
    hidden, targets = hidden[:, :-1][trained], labels[:, 1:][trained]
    total: torch.Tensor = hidden.new_zeros((), dtype=torch.float32)
    # The head is bound, not passed: what is passed is saved, and offloading would copy it.
    chunk_loss = partial(_chunk_loss, model.lm_head)
    for start in range(0, len(targets), chunk_tokens):
        chunk = slice(start, start + chunk_tokens)
        total = total + recompute(chunk_loss, hidden[chunk], targets[chunk], use_reentrant=False)
    return total


def _chunk_loss(head: torch.nn.Module, hidden: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    loss: torch.Tensor = torch.nn.functional.cross_entropy(
        head(hidden).float(), targets, reduction="sum"
    )
    return loss


class QATrainer(Trainer):
    """The Trainer of one attempt; `plan` says how, `checkpoints` is where."""

    control: TrainerControl

    def __init__(self, *args: Any, plan: TrainPlan, checkpoints: Path, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.plan = plan
        self.checkpoints = checkpoints
        self.step_tokens = 0
        self.model_accepts_loss_kwargs = True  # compute_loss divides by the whole batch's tokens
        self.order = EffectiveBatchOrder(
            self.train_dataset.with_format("numpy")["length"][:],
            plan.effective_batch_size,
            plan.seed,
        )

    def get_train_dataloader(self) -> DataLoader[Any]:
        """Steps, each the list of its micro-batches, which stay in host memory until they run."""
        plan = self.plan
        if plan.packing:
            split = partial(pack, capacity_tokens=workload_of(plan).capacity_tokens)
            collate: Any = PackedCollator(self.data_collator.pad_token_id)
        else:
            split = partial(rows_at_a_time, micro_batch_size=plan.micro_batch_size)
            collate = self.data_collator
        loader: DataLoader[Any] = DataLoader(
            StepRows(self.train_dataset),  # type: ignore[arg-type]
            batch_sampler=StepSampler(self.order, split),
            collate_fn=StepCollator(collate),
            pin_memory=self.args.dataloader_pin_memory,
        )
        prepared: DataLoader[Any] = self.accelerator.prepare_data_loader(
            loader, device_placement=False
        )
        return prepared

    def get_batch_samples(
        self, epoch_iterator: Iterator[list[MicroBatch]], num_batches: int, device: torch.device
    ) -> tuple[list[list[MicroBatch]], torch.Tensor]:
        """The next step, and its number of trained tokens."""
        steps = list(islice(epoch_iterator, num_batches))
        batches = [batch for step in steps for batch in step]
        self.step_tokens = sum(map(real_tokens, batches))
        return steps, torch.tensor(sum(map(trained_tokens, batches)), device=device)

    def training_step(
        self,
        model: torch.nn.Module,
        inputs: list[MicroBatch],
        num_items_in_batch: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Forward and backward of each micro-batch; their mean loss per trained token."""
        total = torch.zeros((), device=self.args.device)
        for index, batch in enumerate(inputs):
            if index:
                self.control = self.callback_handler.on_substep_end(
                    self.args, self.state, self.control
                )
            total += super().training_step(model, batch, num_items_in_batch)
        return total

    def _prepare_inputs(self, inputs: MicroBatch) -> MicroBatch:
        """To the device, without waiting for what it still computes."""
        return {
            name: value.to(self.args.device, non_blocking=True)
            if isinstance(value, torch.Tensor)
            else value
            for name, value in inputs.items()
        }

    def floating_point_ops(self, inputs: list[MicroBatch]) -> int:
        """Of all micro-batches of a step."""
        return sum(super(QATrainer, self).floating_point_ops(batch) for batch in inputs)

    def compute_loss(
        self,
        model: torch.nn.Module,
        inputs: MicroBatch,
        return_outputs: bool = False,
        num_items_in_batch: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """This micro-batch's share of the mean loss per trained token of the effective batch."""
        assert num_items_in_batch is not None
        return self._summed_loss(inputs) / num_items_in_batch

    def _summed_loss(self, inputs: MicroBatch) -> torch.Tensor:
        offload = self.plan.offload_activations and torch.is_grad_enabled()
        on_host = torch.autograd.graph.save_on_cpu(pin_memory=True) if offload else nullcontext()
        with self._autocast(), on_host:
            return summed_loss(
                self.accelerator.unwrap_model(self.model).get_base_model(),
                inputs,
                self.plan.loss_chunk_tokens,
            )

    def _autocast(self) -> torch.autocast:
        """bf16 products with the fp32 adapters, where the model computes in bf16."""
        return torch.autocast(
            self.args.device.type,
            dtype=torch.bfloat16,
            enabled=self.plan.model.compute_dtype == "bfloat16",
        )

    def _get_grad_norm(self, model: torch.nn.Module, grad_norm: Any = None) -> float:
        """The gradient norm; raises before the optimizer can apply a non-finite one."""
        norm = float(super()._get_grad_norm(model, grad_norm=grad_norm))
        if not math.isfinite(norm):
            step = self.state.global_step + 1
            raise DivergedError(
                f"The gradient norm at step {step} is {norm}.",
                why="The learning rate is too high, or a row drives the loss out of range.",
                next_command=f"qwen3ft train --set learning_rate={self.plan.learning_rate / 2:g}",
                step=step,
                learning_rate=self.plan.learning_rate,
            )
        return norm

    def evaluate(
        self,
        eval_dataset: Any = None,
        ignore_keys: list[str] | None = None,
        metric_key_prefix: str = "eval",
    ) -> dict[str, float]:
        """Mean negative log-likelihood per trained token over the held-out rows."""
        loss_sum, tokens = 0.0, 0
        self.callback_handler.on_prediction_step(self.args, self.state, self.control)
        self.model.eval()
        for inputs in self.get_eval_dataloader(eval_dataset):
            with torch.no_grad():
                loss_sum += self._summed_loss(self._prepare_inputs(inputs)).item()
            tokens += trained_tokens(inputs)
            self.callback_handler.on_prediction_step(self.args, self.state, self.control)
        self.model.train()
        metrics = {f"{metric_key_prefix}_loss": loss_sum / max(tokens, 1)}
        self.log(metrics)
        self.control = self.callback_handler.on_evaluate(
            self.args, self.state, self.control, metrics
        )
        return metrics

    def _save_checkpoint(self, model: torch.nn.Module, trial: Any) -> None:
        facts = {**checkpoint.lineage(self.plan), "learning_rate": self.plan.learning_rate}
        checkpoint.commit(self.checkpoints, self.state.global_step, self._fill_checkpoint, facts)
        checkpoint.prune(
            self.checkpoints,
            keep=self.plan.keep_checkpoints,
            best_step=self.state.best_global_step,
        )

    def _fill_checkpoint(self, folder: Path) -> None:
        save_adapter_files(self.model, folder)
        save_training_state(folder, _innermost(self.optimizer), self.lr_scheduler)
        self.state.save_to_json(str(folder / STATE_NAME))

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        stored = load_file(Path(resume_from_checkpoint) / ADAPTER_NAME)
        result = set_peft_model_state_dict(self.model, stored)
        if result.unexpected_keys:
            raise CheckpointCorruptError(
                f"{resume_from_checkpoint} holds {len(result.unexpected_keys)} unknown tensors.",
                why="It belongs to another model.",
                next_command="qwen3ft train",
            )

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        if checkpoint is not None:
            load_optimizer_state(
                Path(checkpoint),
                _innermost(self.optimizer),
                self.lr_scheduler,
                self.plan.learning_rate,
            )

    def _load_rng_state(self, checkpoint: str | None) -> None:
        if checkpoint is not None:
            load_rng_state(Path(checkpoint))


def save_adapter_files(model: Any, folder: Path) -> None:
    """Write PEFT's adapter_model.safetensors and adapter_config.json into `folder`."""
    tensors = {
        name: tensor.detach().cpu().contiguous()
        for name, tensor in get_peft_model_state_dict(model).items()
    }
    save_file(tensors, folder / ADAPTER_NAME, metadata={"format": "pt"})
    config = model.peft_config[model.active_adapter]
    training_mode, config.inference_mode = config.inference_mode, True
    config.save_pretrained(str(folder))
    config.inference_mode = training_mode


def _innermost(optimizer: Any) -> torch.optim.Optimizer:
    """The torch optimizer inside accelerate's wrapper."""
    return getattr(optimizer, "optimizer", optimizer)  # type: ignore[no-any-return]
