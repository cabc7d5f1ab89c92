"""Checkpoints of a running training: copied at once, written while training goes on.

On a GPU the copy to host memory takes some tens of milliseconds, and writing, hashing and flushing
it to disk several times that, so a thread does the latter. Guarantees: what is written is the state
of one moment; checkpoints are committed in order, whole or not at all
(`qwen3ft.training.checkpoint`); a write that failed is raised at the next save or wait; `wait`
returns when everything is on disk.
"""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from copy import deepcopy
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from peft import get_peft_model_state_dict
from safetensors.torch import save_file

from qwen3ft.training import checkpoint
from qwen3ft.training.training_state import read_training_state, write_training_state

if TYPE_CHECKING:
    from transformers import TrainerState

ADAPTER_NAME = "adapter_model.safetensors"
STATE_NAME = "trainer_state.json"


class CheckpointWriter:
    """Writes into the folder of checkpoints of one attempt.

    Args:
        folder: Where they go.
        keep: Newest ones to keep beside the best.
        background: Whether training goes on while one is written.
    """

    def __init__(self, folder: Path, keep: int, *, background: bool) -> None:
        self.folder = folder
        self.keep = keep
        self._thread = ThreadPoolExecutor(1, "checkpoints") if background else None
        self._pending: Future[None] | None = None

    def save(
        self,
        model: Any,
        optimizer: torch.optim.Optimizer,
        scheduler: torch.optim.lr_scheduler.LRScheduler,
        state: TrainerState,
        facts: dict[str, Any],
    ) -> None:
        """Take the state of this moment, and commit it as the checkpoint of its step.

        Raises:
            OSError: this one, or in the background the one before, could not be written.
        """
        self.wait()
        fill: list[Callable[[Path], None]] = [
            read_adapter_files(model),
            partial(write_training_state, state=read_training_state(optimizer, scheduler)),
            partial(_write_state, state=deepcopy(state)),
        ]
        step, best_step = state.global_step, state.best_global_step
        if self._thread is None:
            self._commit(step, best_step, fill, facts)
        else:
            self._pending = self._thread.submit(self._commit, step, best_step, fill, facts)

    def wait(self) -> None:
        """Until nothing is being written.

        Raises:
            OSError: the last one could not be written.
        """
        pending, self._pending = self._pending, None
        if pending is not None:
            pending.result()

    def _commit(
        self,
        step: int,
        best_step: int | None,
        fill: list[Callable[[Path], None]],
        facts: dict[str, Any],
    ) -> None:
        def fill_all(folder: Path) -> None:
            for write in fill:
                write(folder)

        checkpoint.commit(self.folder, step, fill_all, facts)
        checkpoint.prune(self.folder, keep=self.keep, best_step=best_step)


def read_adapter_files(model: Any) -> Callable[[Path], None]:
    """Copy the adapter; what is returned writes PEFT's two files of it into a folder."""
    tensors = {
        name: tensor.detach().to("cpu", copy=True).contiguous()
        for name, tensor in get_peft_model_state_dict(model).items()
    }
    config = deepcopy(model.peft_config[model.active_adapter])
    config.inference_mode = True

    def write(folder: Path) -> None:
        save_file(tensors, folder / ADAPTER_NAME, metadata={"format": "pt"})
        config.save_pretrained(str(folder))

    return write


def _write_state(folder: Path, state: TrainerState) -> None:
    state.save_to_json(str(folder / STATE_NAME))
