"""What a block keeps from its forward for its backward, on the device or in host memory."""

from __future__ import annotations

import itertools
from dataclasses import dataclass, field

import torch

from qwen3ft.training.fused.offload import HostStash, Stashed


@dataclass
class Kept:
    """What a block keeps; None is computed again.

    Attributes:
        x: The block's input, (T, hidden).
        qkv: Before norms and rotation, (T, (query + 2 key-value heads) x head_dim).
        attended: Output of attention, (T, query heads, head_dim).
        log_sum_exp: Of its scores, (query heads, T).
        attended_low: Its product with o's A, (T, rank).
        x_mid: Between attention and MLP, (T, hidden).
        gate_up: (chunk, 2 x intermediate) of each chunk.
        activated_low: Product of the MLP's inner activation with down's A, (T, rank).
        offloaded: Of these, by name, those that wait in host memory; gate_up chunk by chunk.
    """

    x: torch.Tensor | None
    qkv: torch.Tensor | None = None
    attended: torch.Tensor | None = None
    log_sum_exp: torch.Tensor | None = None
    attended_low: torch.Tensor | None = None
    x_mid: torch.Tensor | None = None
    gate_up: list[torch.Tensor] | None = None
    activated_low: torch.Tensor | None = None
    offloaded: dict[str, list[Stashed]] = field(default_factory=dict)

    def offload(self, stash: HostStash, names: tuple[str, ...]) -> None:
        """Have those of `names` that are kept wait in host memory."""
        kept = {name: value for name in names if (value := getattr(self, name)) is not None}
        tensors = {name: v if isinstance(v, list) else [v] for name, v in kept.items()}
        stashed = iter(stash.put(list(itertools.chain.from_iterable(tensors.values()))))
        for name, of_name in tensors.items():
            self.offloaded[name] = list(itertools.islice(stashed, len(of_name)))
            setattr(self, name, None)

    def fetch(self, stash: HostStash) -> None:
        """Start the way back of what waits in host memory."""
        for stashed in itertools.chain.from_iterable(self.offloaded.values()):
            stash.fetch(stashed)

    def take_back(self, stash: HostStash) -> None:
        """Have everything on the device again."""
        for name, stashed in self.offloaded.items():
            tensors = [stash.take(each) for each in stashed]
            setattr(self, name, tensors if name == "gate_up" else tensors[0])
        self.offloaded = {}
