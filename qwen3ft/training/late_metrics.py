"""Numbers of a step read back one step later, so that the GPU never waits for the host.

Reading a loss from a GPU waits until everything before it is done; nothing is queued meanwhile, and
the GPU idles while the host prepares the next step. Instead each number starts its way to pinned
host memory with its step and is read when the next step is already queued.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class StepNumbers:
    """What one optimizer step measured.

    Attributes:
        step: Its number, from 1.
        epoch: How many epochs were done after it.
        learning_rate: That it used.
        loss: Mean negative log-likelihood per trained token, in nats.
        grad_norm: Before clipping.
    """

    step: int
    epoch: float
    learning_rate: float
    loss: float
    grad_norm: float


@dataclass(frozen=True)
class _OnItsWay:
    step: int
    epoch: float
    learning_rate: float
    numbers: torch.Tensor
    arrived: torch.cuda.Event | None


class DelayedMetrics:
    """Steps whose numbers are on their way, oldest first.

    Args:
        lag: Newest steps that `take` leaves on their way.
    """

    def __init__(self, lag: int) -> None:
        self.lag = lag
        self._queue: deque[_OnItsWay] = deque()

    def put(
        self,
        step: int,
        epoch: float,
        learning_rate: float,
        loss: torch.Tensor,
        grad_norm: torch.Tensor,
    ) -> None:
        """Start the way of a step's numbers, scalars on its device."""
        numbers = torch.stack((loss.detach().float(), grad_norm.detach().float()))
        arrived = None
        if numbers.is_cuda:
            pinned = torch.empty(2, dtype=torch.float32, pin_memory=True)
            numbers = pinned.copy_(numbers, non_blocking=True)
            arrived = torch.cuda.current_stream().record_event()
        self._queue.append(_OnItsWay(step, epoch, learning_rate, numbers, arrived))

    def take(self, *, everything: bool = False) -> list[StepNumbers]:
        """Those of all steps but the newest `lag`, or of all; waits for them."""
        taken = []
        while len(self._queue) > (0 if everything else self.lag):
            item = self._queue.popleft()
            if item.arrived is not None:
                item.arrived.synchronize()
            loss, grad_norm = item.numbers.tolist()
            taken.append(StepNumbers(item.step, item.epoch, item.learning_rate, loss, grad_norm))
        return taken
