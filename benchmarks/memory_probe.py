"""Where in a fused step the allocator's peak lies: the peak of each part, by its functions.

Wraps functions of `qwen3ft.training.fused` in this process; what they do stays the same. The
allocator's own peaks are reset on the way, so a probed training has no other.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch

REST = "between"


class PeakProbe:
    """Highest bytes allocated within each part, and between them."""

    def __init__(self) -> None:
        self.peak_bytes: dict[str, int] = {}

    def around(self, part: str, function: Callable[..., Any]) -> Callable[..., Any]:
        """`function`, whose peak counts as that of `part`."""

        def measured(*args: Any, **kwargs: Any) -> Any:
            self.take(REST)
            result = function(*args, **kwargs)
            self.take(part)
            return result

        return measured

    def take(self, part: str) -> None:
        """The peak since the last call was that of `part`."""
        peak = torch.cuda.max_memory_allocated()
        self.peak_bytes[part] = max(peak, self.peak_bytes.get(part, 0))
        torch.cuda.reset_peak_memory_stats()


@contextmanager
def probed() -> Iterator[PeakProbe]:
    """Within it, every fused step is measured by part."""
    from qwen3ft.training.engine import TrainingEngine
    from qwen3ft.training.fused.block import FusedBlock
    from qwen3ft.training.fused.step import FusedStep

    probe = PeakProbe()
    owners: list[tuple[Any, str, str]] = [
        (FusedStep, "_loss", "loss"),
        (FusedBlock, "forward", "forward of a block"),
        (FusedBlock, "_mlp_backward", "backward of an MLP"),
        (FusedBlock, "_attention_backward", "backward of attention"),
        (TrainingEngine, "create_trainer", "load"),
    ]
    before = [getattr(owner, name) for owner, name, _ in owners]
    for (owner, name, part), function in zip(owners, before, strict=True):
        setattr(owner, name, probe.around(part, function))
    try:
        yield probe
    finally:
        for (owner, name, _), function in zip(owners, before, strict=True):
            setattr(owner, name, function)
        probe.take(REST)
