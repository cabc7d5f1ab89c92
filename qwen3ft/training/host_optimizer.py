"""AdamW with its moments in host memory, which saves 8 bytes of GPU memory per parameter.

The arithmetic is torch's own fused AdamW on the CPU in fp32. Each step copies gradients to the host
and parameters back, a few MB each way, and waits for them. State dictionaries are AdamW's.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Any

import torch
from torch.optim.adamw import adamw

if TYPE_CHECKING:
    from transformers import TrainingArguments

MOMENTS = ("exp_avg", "exp_avg_sq")


class HostAdamW(torch.optim.AdamW):
    """AdamW (Loshchilov and Hutter 2017, arXiv:1711.05101) that computes on the host.

    Attributes:
        found_inf: Tensor; if not zero, a step changes nothing, as in torch's fused optimizers.
    """

    def __init__(
        self,
        parameters: Iterable[torch.nn.Parameter],
        *,
        lr: float,
        betas: tuple[float, float],
        eps: float,
        weight_decay: float,
    ) -> None:
        super().__init__(parameters, lr=lr, betas=betas, eps=eps, weight_decay=weight_decay)
        self.found_inf: torch.Tensor | None = None

    @classmethod
    def from_arguments(
        cls, parameters: Iterable[torch.nn.Parameter], arguments: TrainingArguments
    ) -> HostAdamW:
        """Create the optimizer with the settings of transformers' `arguments`."""
        return cls(
            parameters,
            lr=arguments.learning_rate,
            betas=(arguments.adam_beta1, arguments.adam_beta2),
            eps=arguments.adam_epsilon,
            weight_decay=arguments.weight_decay,
        )

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        """Update all parameters that have a gradient.

        Raises:
            ValueError: a closure is given.
        """
        if closure is not None:
            raise ValueError("HostAdamW does not support closures.")
        # Waits for the GPU, as the copies of the gradients would.
        if self.found_inf is not None and self.found_inf.item():
            return
        for group in self.param_groups:
            updated = [parameter for parameter in group["params"] if parameter.grad is not None]
            states = [self._state_of(parameter) for parameter in updated]
            values = [parameter.detach().cpu() for parameter in updated]
            adamw(
                values,
                [parameter.grad.detach().cpu() for parameter in updated],
                [state["exp_avg"] for state in states],
                [state["exp_avg_sq"] for state in states],
                [],
                [state["step"] for state in states],
                fused=True,
                amsgrad=False,
                beta1=group["betas"][0],
                beta2=group["betas"][1],
                lr=group["lr"],
                weight_decay=group["weight_decay"],
                eps=group["eps"],
                maximize=False,
            )
            for parameter, value in zip(updated, values, strict=True):
                parameter.copy_(value)  # the same memory if the parameter is on the CPU

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load AdamW's state into host memory."""
        super().load_state_dict(state_dict)
        for state in self.state.values():  # torch has moved it to the parameters' device
            state.update({name: state[name].cpu() for name in (*MOMENTS, "step")})

    def _state_of(self, parameter: torch.nn.Parameter) -> dict[str, torch.Tensor]:
        state: dict[str, torch.Tensor] = self.state[parameter]
        if not state:
            like: dict[str, Any] = {"dtype": torch.float32, "device": "cpu"}
            state["step"] = torch.zeros((), **like)  # the fused update takes tensors only
            state.update({name: torch.zeros(parameter.shape, **like) for name in MOMENTS})
        return state
