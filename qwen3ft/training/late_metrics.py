"""Metrics read back one step later, so that the GPU never waits for the host.

Each step copies its numbers to pinned host memory, and they are read when the next one is queued.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class StepNumbers:
    """Metrics of one optimizer step."""

    step: int
    """Number of the step, from 1."""
    epoch: float
    """Epochs done after it."""
    learning_rate: float
    loss: float
    """Mean negative log-likelihood per trained token, in nats."""
    grad_norm: float
    """Gradient norm before clipping."""


_Pending = tuple[int, float, float, torch.Tensor, "torch.cuda.Event | None"]
"""Step, epoch, learning rate, (loss, gradient norm) and the event of their arrival."""


class DelayedMetrics:
    """Queue of steps whose numbers are being copied to the host, oldest first.

    Args:
        lag: Newest steps that `take` leaves in the queue.
    """

    def __init__(self, lag: int) -> None:
        self.lag = lag
        self._queue: deque[_Pending] = deque()

    def put(
        self,
        step: int,
        epoch: float,
        learning_rate: float,
        loss: torch.Tensor,
        grad_norm: torch.Tensor,
    ) -> None:
        """Start copying a step's numbers, which are scalars on the device."""
        numbers = torch.stack((loss.detach().float(), grad_norm.detach().float()))
        arrived = None
        if numbers.is_cuda:
            # Reading them here would wait for all queued work, and the GPU then idles while the
            # host prepares the next step. Only copies to pinned memory return at once.
            pinned = torch.empty(2, dtype=torch.float32, pin_memory=True)
            numbers = pinned.copy_(numbers, non_blocking=True)
            arrived = torch.cuda.current_stream().record_event()
        self._queue.append((step, epoch, learning_rate, numbers, arrived))

    def take(self, *, everything: bool = False) -> Iterator[StepNumbers]:
        """Wait for and yield all steps but the newest `lag`, or all, each as soon as it is done."""
        while len(self._queue) > (0 if everything else self.lag):
            step, epoch, learning_rate, numbers, arrived = self._queue.popleft()
            if arrived is not None:
                arrived.synchronize()
            loss, grad_norm = numbers.tolist()
            yield StepNumbers(step, epoch, learning_rate, loss, grad_norm)
