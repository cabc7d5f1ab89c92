"""Planted faults of a training attempt; installed only if the environment asks for them."""

from __future__ import annotations

from typing import Any

import torch
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from qwen3ft.faults import Fault, strike_process
from qwen3ft.logs import get_logger

logger = get_logger("train")

_LEAKED: list[torch.Tensor] = []


class FaultCallback(TrainerCallback):
    """Trigger of the faults before steps."""

    def __init__(self, faults: list[Fault]) -> None:
        self.faults = faults

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Trigger the faults that are due before this step."""
        for fault in self.faults:
            if fault.is_due(state.global_step + 1):
                if fault.step == state.global_step + 1:
                    logger.warning("planted fault %s strikes at step %d", fault.action, fault.step)
                _strike(fault, kwargs["model"])


def _strike(fault: Fault, model: Any) -> None:
    """Make `fault` happen in this process, which trains `model`."""
    match fault.action:
        case "oom":
            raise torch.OutOfMemoryError(
                "CUDA out of memory. Tried to allocate 594.00 MiB. GPU 0 has a total capacity of "
                "13.00 GiB of which 231.44 MiB is free. (planted)"
            )
        case "nan":
            parameter = next(p for p in model.parameters() if p.requires_grad)
            parameter.register_hook(lambda gradient: gradient * float("nan"))
        case "leak":
            place = next(model.parameters()).device
            _LEAKED.append(torch.ones(fault.leak_bytes, dtype=torch.uint8, device=place))
        case _:
            strike_process(fault)
