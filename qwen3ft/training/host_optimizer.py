"""AdamW whose moments stay in host memory: the last of the levers against the card's memory.

Guarantees: the arithmetic is torch's own fused AdamW on the CPU, in fp32, so nothing of the result
is given up; on the card it holds nothing between steps. Gradients and parameters travel at each
step, a few MB each way, and the step waits for them. State dictionaries are AdamW's.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch.optim.adamw import adamw

MOMENTS = ("exp_avg", "exp_avg_sq")


class HostAdamW(torch.optim.AdamW):
    """Decoupled weight decay (Loshchilov and Hutter 2017, arXiv:1711.05101), on the host.

    A tensor set as `found_inf` and not zero makes a step leave everything alone, as it does for
    torch's fused optimizers.
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

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        """One update of all parameters that have a gradient.

        Raises:
            ValueError: a closure is given; none is needed for AdamW.
        """
        if closure is not None:
            raise ValueError("This optimizer calls no closure.")
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
                parameter.copy_(value)  # on a CPU it is the same memory

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """AdamW's; what torch moves to the parameters' device goes back to the host."""
        super().load_state_dict(state_dict)
        for state in self.state.values():
            state.update({name: state[name].cpu() for name in (*MOMENTS, "step")})

    def _state_of(self, parameter: torch.nn.Parameter) -> dict[str, torch.Tensor]:
        state: dict[str, torch.Tensor] = self.state[parameter]
        if not state:
            like: dict[str, Any] = {"dtype": torch.float32, "device": "cpu"}
            state["step"] = torch.zeros((), **like)
            state.update({name: torch.zeros(parameter.shape, **like) for name in MOMENTS})
        return state
