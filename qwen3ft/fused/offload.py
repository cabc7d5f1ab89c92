"""What blocks keep, waiting in pinned host memory; copies run beside the computation.

A tensor leaves on a stream of its own while the next block runs, and comes back while the block
after its own is in its backward. Nothing here waits on the host.
"""

from __future__ import annotations

import math
from collections import deque
from dataclasses import dataclass

import torch

SLAB_BYTES = 64 * 2**20
"""Pinned memory is taken in pieces of this: torch rounds requests up to a power of two."""


@dataclass
class Stashed:
    """A tensor in host memory, and on its way back once that was asked for."""

    shape: torch.Size
    dtype: torch.dtype
    slabs: list[torch.Tensor]
    returned: torch.Tensor | None = None
    arrived: torch.cuda.Event | None = None


class HostStash:
    """Host memory for tensors of one device; its slabs are used again by later steps.

    Args:
        device: Of the tensors; on a CPU copies are made at once.
        leaving: Tensors that may still be on their way out; more of them take more device memory.
    """

    def __init__(self, device: torch.device, leaving: int = 3) -> None:
        on_gpu = device.type == "cuda"
        self._stream = torch.cuda.Stream(device) if on_gpu else None  # type: ignore[no-untyped-call]
        self._device = device
        self._free: list[torch.Tensor] = []
        self._leaving: deque[tuple[torch.Tensor, torch.cuda.Event]] = deque()
        self._most_leaving = leaving

    def put(self, tensor: torch.Tensor) -> Stashed:
        """Start the way out of `tensor`, which is dense."""
        source = tensor.reshape(-1).view(torch.uint8)
        slabs = [self._slab() for _ in range(math.ceil(source.numel() / SLAB_BYTES))]
        stashed = Stashed(tensor.shape, tensor.dtype, slabs)
        if self._stream is None:
            self._copy(stashed, source, out=True)
            return stashed
        self._stream.wait_stream(torch.cuda.current_stream(self._device))
        with torch.cuda.stream(self._stream):
            self._copy(stashed, source, out=True)
            left = self._stream.record_event()
        self._leaving.append((source, left))
        self._let_go(self._most_leaving)
        return stashed

    def fetch(self, stashed: Stashed) -> None:
        """Start the way back."""
        self.settle()
        returned = torch.empty(stashed.shape, dtype=stashed.dtype, device=self._device)
        stashed.returned = returned
        target = returned.view(-1).view(torch.uint8)
        if self._stream is None:
            self._copy(stashed, target, out=False)
            return
        self._stream.wait_stream(torch.cuda.current_stream(self._device))
        with torch.cuda.stream(self._stream):
            self._copy(stashed, target, out=False)
            stashed.arrived = self._stream.record_event()

    def take(self, stashed: Stashed) -> torch.Tensor:
        """The tensor, back on the device."""
        if stashed.returned is None:
            self.fetch(stashed)
        if stashed.arrived is not None:
            torch.cuda.current_stream(self._device).wait_event(stashed.arrived)
        # A later way out runs on the same stream, so after this copy.
        self._free += stashed.slabs
        stashed.slabs = []
        assert stashed.returned is not None
        return stashed.returned

    def settle(self) -> None:
        """Free what has left: what is queued from here on waits until it has."""
        self._let_go(0)

    def _copy(self, stashed: Stashed, flat: torch.Tensor, *, out: bool) -> None:
        for index, slab in enumerate(stashed.slabs):
            part = flat[index * SLAB_BYTES : (index + 1) * SLAB_BYTES]
            if out:
                slab[: part.numel()].copy_(part, non_blocking=True)
            else:
                part.copy_(slab[: part.numel()], non_blocking=True)

    def _let_go(self, most: int) -> None:
        """Free what left, all but the newest `most`: later work waits until it is out."""
        while len(self._leaving) > most:
            _, left = self._leaving.popleft()
            torch.cuda.current_stream(self._device).wait_event(left)

    def _slab(self) -> torch.Tensor:
        if self._free:
            return self._free.pop()
        return torch.empty(SLAB_BYTES, dtype=torch.uint8, pin_memory=self._stream is not None)
