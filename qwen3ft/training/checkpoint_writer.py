"""Writing of checkpoints: the state is copied at once, and on a GPU written in the background.

Checkpoints are committed in order, whole or not at all (`qwen3ft.training.checkpoint`). A failed
write is raised at the next save or wait.
"""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from copy import deepcopy
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from peft import get_peft_model_state_dict, set_peft_model_state_dict
from safetensors.torch import load_file, save_file

from qwen3ft.disk.files import fsync_dir, fsync_file
from qwen3ft.errors import CheckpointCorruptError
from qwen3ft.faults import reach
from qwen3ft.model.adapter_checks import ADAPTER_FILE
from qwen3ft.training import checkpoint
from qwen3ft.training.checkpoint import STATE_NAME, TENSORS_NAME, VALUES_NAME

if TYPE_CHECKING:
    from transformers import TrainerState


@dataclass(frozen=True)
class TrainingState:
    """A copy of the state in host memory: tensors by name, and plain values."""

    tensors: dict[str, torch.Tensor]
    values: dict[str, Any]


def read_training_state(
    optimizer: torch.optim.Optimizer, scheduler: torch.optim.lr_scheduler.LRScheduler
) -> TrainingState:
    """Copy the state of `optimizer`, `scheduler` and all random generators."""
    optimizer_state = optimizer.state_dict()
    tensors = {"rng.torch": torch.get_rng_state()}
    if torch.cuda.is_available():
        tensors["rng.cuda"] = torch.cuda.get_rng_state()
    values: dict[str, Any] = {}
    for index, entries in optimizer_state["state"].items():
        for name, value in entries.items():
            if isinstance(value, torch.Tensor):
                # A copy also of what is on the host, such as moments: training goes on changing it.
                copied = value.detach().to("cpu", copy=True).contiguous()
                tensors[f"optimizer.{index}.{name}"] = copied
            else:
                values[f"optimizer.{index}.{name}"] = value
    numpy_state = np.random.get_state(legacy=False)
    version, words, gauss = random.getstate()
    content = {
        "optimizer_values": values,
        "param_groups": optimizer_state["param_groups"],
        "scheduler": scheduler.state_dict(),
        "rng_python": [version, list(words), gauss],
        "rng_numpy": {
            **numpy_state,
            "state": {
                "key": numpy_state["state"]["key"].tolist(),
                "pos": int(numpy_state["state"]["pos"]),
            },
        },
    }
    return TrainingState(tensors, deepcopy(content))


def write_training_state(folder: Path, state: TrainingState) -> None:
    """Write `state` into `folder`."""
    save_file(state.tensors, folder / TENSORS_NAME)
    text = json.dumps(state.values, default=_plain)
    (folder / VALUES_NAME).write_text(text, encoding="utf-8")


def load_adapter(folder: Path, model: Any) -> None:
    """Load the adapter of the checkpoint in `folder` into `model`.

    Raises:
        CheckpointCorruptError: it has other tensors than the model.
    """
    # Keys that are missing are no damage: PEFT counts those of the base model among them.
    result = set_peft_model_state_dict(model, load_file(folder / ADAPTER_FILE))
    if result.unexpected_keys:
        raise CheckpointCorruptError(
            f"{folder} has {len(result.unexpected_keys)} unknown tensors.",
            why="It belongs to another model.",
            next_command="qwen3ft train",
        )


def load_optimizer_state(
    folder: Path,
    optimizer: torch.optim.Optimizer,
    scheduler: torch.optim.lr_scheduler.LRScheduler,
    learning_rate: float,
) -> None:
    """Restore optimizer and scheduler, bit for bit unless the peak `learning_rate` has changed.

    After a divergence the plan's rate is half the checkpoint's; the position in the schedule stays.
    """
    tensors, content = load_file(folder / TENSORS_NAME), _read_values(folder)
    state: dict[int, dict[str, Any]] = {}
    stored = {**tensors, **content["optimizer_values"]}
    for key, value in stored.items():
        prefix, _, rest = key.partition(".")
        if prefix == "optimizer":
            index, _, name = rest.partition(".")
            state.setdefault(int(index), {})[name] = value
    optimizer.load_state_dict({"state": state, "param_groups": content["param_groups"]})
    scheduler.load_state_dict(content["scheduler"])
    if learning_rate == content["param_groups"][0]["initial_lr"]:
        return
    factor = learning_rate / content["param_groups"][0]["initial_lr"]
    for group in optimizer.param_groups:
        group["initial_lr"] = learning_rate
        group["lr"] *= factor
    # LambdaLR computes each rate from these, not from the group.
    scheduler.base_lrs = [learning_rate for _ in scheduler.base_lrs]
    scheduler._last_lr = [group["lr"] for group in optimizer.param_groups]  # logged next


def load_rng_state(folder: Path) -> None:
    """Restore the generators of Python, NumPy, torch and the current CUDA device."""
    tensors, content = load_file(folder / TENSORS_NAME), _read_values(folder)
    version, words, gauss = content["rng_python"]
    random.setstate((version, tuple(words), gauss))  # JSON made a list of the tuple
    numpy_state = content["rng_numpy"]
    numpy_state["state"]["key"] = np.array(numpy_state["state"]["key"], dtype=np.uint32)
    np.random.set_state(numpy_state)
    torch.set_rng_state(tensors["rng.torch"])
    if "rng.cuda" in tensors and torch.cuda.is_available():
        torch.cuda.set_rng_state(tensors["rng.cuda"])


def _read_values(folder: Path) -> dict[str, Any]:
    content: dict[str, Any] = json.loads((folder / VALUES_NAME).read_text(encoding="utf-8"))
    return content


def _plain(value: Any) -> Any:
    """Return the number in a NumPy or torch scalar, which optimizers and schedulers may hold."""
    if isinstance(value, (np.generic, torch.Tensor)):
        return value.item()
    raise TypeError(f"{type(value).__name__} cannot be stored in a checkpoint")


class CheckpointWriter:
    """Writer of the checkpoints of one attempt.

    Args:
        folder: Folder of the checkpoints.
        keep: Number of newest ones to keep besides the best.
        background: Let training go on while one is written.
        logs: Files that must be as durable as the checkpoint, if they exist: lines that were
            written before it will not be written again.
    """

    def __init__(
        self, folder: Path, keep: int, *, background: bool, logs: Sequence[Path] = ()
    ) -> None:
        self.folder = folder
        self.keep = keep
        self.logs = logs
        # The copy to host memory takes some tens of milliseconds; writing, hashing and flushing it
        # take several times that.
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
        """Copy the present state, and commit it as the checkpoint of its step.

        Raises:
            OSError: this checkpoint, or in the background the previous one, could not be written.
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
        """Wait until everything is on disk.

        Raises:
            OSError: the last checkpoint could not be written.
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

        for log in self.logs:
            if log.exists():
                fsync_file(log)
                fsync_dir(log.parent)
        checkpoint.commit(self.folder, step, fill_all, facts)
        reach("checkpoint.committed")
        checkpoint.prune(self.folder, keep=self.keep, best_step=best_step)
        reach("checkpoint.pruned")


def read_adapter_files(model: Any) -> Callable[[Path], None]:
    """Copy the adapter; return a function that writes PEFT's two files into a folder."""
    tensors = {
        name: tensor.detach().to("cpu", copy=True).contiguous()
        for name, tensor in get_peft_model_state_dict(model).items()
    }
    config = deepcopy(model.peft_config[model.active_adapter])
    config.inference_mode = True  # as PEFT's save_pretrained does

    def write(folder: Path) -> None:
        save_file(tensors, folder / ADAPTER_FILE, metadata={"format": "pt"})
        config.save_pretrained(str(folder))

    return write


def _write_state(folder: Path, state: TrainerState) -> None:
    state.save_to_json(str(folder / STATE_NAME))
