"""What a resumed run needs besides the adapter: optimizer, scheduler and random number generators.

Stored as safetensors and JSON, so that continuing from a checkpoint never unpickles anything and
restores every bit: a run that is killed and resumed ends with the weights it would have had.
"""

from __future__ import annotations

import json
import random
from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file, save_file

TENSORS_NAME = "training_state.safetensors"
VALUES_NAME = "training_state.json"


@dataclass(frozen=True)
class TrainingState:
    """Copies of everything, in host memory: tensors by name, and plain values."""

    tensors: dict[str, torch.Tensor]
    values: dict[str, Any]


def read_training_state(
    optimizer: torch.optim.Optimizer, scheduler: torch.optim.lr_scheduler.LRScheduler
) -> TrainingState:
    """The state of `optimizer`, `scheduler` and all generators at this moment."""
    optimizer_state = optimizer.state_dict()
    tensors = {"rng.torch": torch.get_rng_state()}
    if torch.cuda.is_available():
        tensors["rng.cuda"] = torch.cuda.get_rng_state()
    values: dict[str, Any] = {}
    for index, entries in optimizer_state["state"].items():
        for name, value in entries.items():
            if isinstance(value, torch.Tensor):
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


def load_optimizer_state(
    folder: Path,
    optimizer: torch.optim.Optimizer,
    scheduler: torch.optim.lr_scheduler.LRScheduler,
    learning_rate: float,
) -> None:
    """Restore optimizer and scheduler, at a peak `learning_rate` that may differ from before.

    After a divergence the plan's rate is half the checkpoint's; the position in the schedule stays.
    With an unchanged rate every restored value equals the saved one bit for bit.
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
    scheduler.base_lrs = [learning_rate for _ in scheduler.base_lrs]


def load_rng_state(folder: Path) -> None:
    """Restore the generators of Python, NumPy, torch and the current CUDA device."""
    tensors, content = load_file(folder / TENSORS_NAME), _read_values(folder)
    version, words, gauss = content["rng_python"]
    random.setstate((version, tuple(words), gauss))
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
    """NumPy and torch scalars that optimizers and schedulers keep among plain numbers."""
    if isinstance(value, (np.generic, torch.Tensor)):
        return value.item()
    raise TypeError(f"{type(value).__name__} cannot be stored in a checkpoint")
