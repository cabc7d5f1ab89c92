"""Tensors that a block keeps from forward to backward, on the device or in host memory."""

from __future__ import annotations

import itertools
from dataclasses import dataclass, field

from torch import Tensor

from qwen3ft.training.fused.offload import HostStash, Stashed


@dataclass
class Kept:
    """Tensors that a block keeps; those that are None are recomputed."""

    x: Tensor | None
    """Input of the block, (T, hidden)."""
    qkv: Tensor | None = None
    """q, k and v before norms and rotation, (T, (query + 2 key-value heads) x head_dim)."""
    attended: Tensor | None = None
    """Output of attention, (T, query heads, head_dim)."""
    log_sum_exp: Tensor | None = None
    """Log-sum-exp of attention's scores, (query heads, T)."""
    attended_low: Tensor | None = None
    """Product of `attended` with o's A, (T, rank)."""
    x_mid: Tensor | None = None
    """Hidden states between attention and MLP, (T, hidden)."""
    gate_up: list[Tensor] | None = None
    """gate and up of each chunk, (chunk, 2 x intermediate)."""
    activated_low: Tensor | None = None
    """Product of the MLP's inner activation with down's A, (T, rank)."""
    offloaded: dict[str, list[Stashed]] = field(default_factory=dict)
    """Tensors in host memory, by name; gate_up has one per chunk."""

    def offload(self, stash: HostStash, names: tuple[str, ...]) -> None:
        """Move those of `names` that are kept to host memory."""
        kept = {name: value for name in names if (value := getattr(self, name)) is not None}
        tensors = {name: v if isinstance(v, list) else [v] for name, v in kept.items()}
        stashed = iter(stash.put(list(itertools.chain.from_iterable(tensors.values()))))
        for name, of_name in tensors.items():
            self.offloaded[name] = list(itertools.islice(stashed, len(of_name)))
            setattr(self, name, None)

    def fetch(self, stash: HostStash) -> None:
        """Start copying offloaded tensors back to the device."""
        for stashed in itertools.chain.from_iterable(self.offloaded.values()):
            stash.fetch(stashed)

    def take_back(self, stash: HostStash) -> None:
        """Wait for offloaded tensors, and put them in their places."""
        for name, stashed in self.offloaded.items():
            tensors = [stash.take(each) for each in stashed]
            setattr(self, name, tensors if name == "gate_up" else tensors[0])
        self.offloaded = {}
