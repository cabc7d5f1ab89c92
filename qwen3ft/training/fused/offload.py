"""Offloading of kept tensors to pinned host memory, with copies that overlap the computation.

A block's tensors are copied out on a separate stream while the next block runs forward, and back
while later blocks run backward. The host waits for nothing.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from qwen3ft.errors import OutOfMemoryError
from qwen3ft.units import MIB, size_text

SLAB_BYTES = 64 * MIB
"""A power of two, because torch rounds allocations of pinned memory up to one."""

ALIGNMENT_BYTES = 512


@dataclass
class Stashed:
    """A tensor in host memory, and its copy on the device once it is requested."""

    shape: torch.Size
    dtype: torch.dtype
    start: int
    size_bytes: int
    returned: Tensor | None = None
    arrived: torch.cuda.Event | None = None


class HostStash:
    """Stack of tensors in host memory; empty again after each backward.

    Args:
        device: Device of the tensors; on a CPU they are copied at once.
        slab_bytes: Size of one allocation of pinned memory.
    """

    def __init__(self, device: torch.device, slab_bytes: int = SLAB_BYTES) -> None:
        on_gpu = device.type == "cuda"
        self._stream = torch.cuda.Stream(device) if on_gpu else None  # type: ignore[no-untyped-call]
        self._device = device
        self._slab_bytes = slab_bytes
        self._slabs: list[Tensor] = []
        self._used_bytes = 0
        self._waiting = 0
        self._leaving: deque[tuple[list[Tensor], torch.cuda.Event]] = deque()

    @property
    def pinned_bytes(self) -> int:
        """Host memory allocated so far; it is reused by later steps."""
        return len(self._slabs) * self._slab_bytes

    def put(self, tensors: Sequence[Tensor]) -> list[Stashed]:
        """Start copying a block's tensors out.

        Those of the previous block may still be copying; work queued later waits for older ones.

        Raises:
            OutOfMemoryError: of the domain host: no more pinned memory is available.
        """
        sources = [tensor.reshape(-1).view(torch.uint8) for tensor in tensors]
        stashed = [
            self._reserve(tensor, source.numel())
            for tensor, source in zip(tensors, sources, strict=True)
        ]
        if self._stream is None:
            self._copy_out(sources, stashed)
            return stashed
        self._stream.wait_stream(torch.cuda.current_stream(self._device))
        with torch.cuda.stream(self._stream):
            self._copy_out(sources, stashed)
        # Held until they have left: the allocator would give their memory to the next tensor.
        self._leaving.append((sources, self._stream.record_event()))
        self._let_go(1)
        return stashed

    def settle(self) -> None:
        """Free the tensors copied out; work queued from now on waits for the copies."""
        self._let_go(0)

    def fetch(self, stashed: Stashed) -> None:
        """Start copying a tensor back."""
        self.settle()
        stashed.returned = torch.empty(stashed.shape, dtype=stashed.dtype, device=self._device)
        if self._stream is None:
            self._copy_back(stashed)
            return
        # Work queued on the current stream may still use the memory that the new tensor got.
        self._stream.wait_stream(torch.cuda.current_stream(self._device))
        with torch.cuda.stream(self._stream):
            self._copy_back(stashed)
        stashed.arrived = self._stream.record_event()

    def take(self, stashed: Stashed) -> Tensor:
        """Return the tensor on the device."""
        if stashed.returned is None:
            self.fetch(stashed)
        if stashed.arrived is not None:
            torch.cuda.current_stream(self._device).wait_event(stashed.arrived)
        self._waiting -= 1
        if not self._waiting:
            # Later copies to this memory run on the same stream, so after this one.
            self._used_bytes = 0
        assert stashed.returned is not None
        return stashed.returned

    def _reserve(self, tensor: Tensor, size_bytes: int) -> Stashed:
        start, end = self._used_bytes, self._used_bytes + size_bytes
        while self.pinned_bytes < end:
            self._slabs.append(self._new_slab())
        self._used_bytes = -(-end // ALIGNMENT_BYTES) * ALIGNMENT_BYTES
        self._waiting += 1
        return Stashed(tensor.shape, tensor.dtype, start, size_bytes)

    def _new_slab(self) -> Tensor:
        try:
            pinned = self._stream is not None
            return torch.empty(self._slab_bytes, dtype=torch.uint8, pin_memory=pinned)
        except RuntimeError as error:
            raise OutOfMemoryError(
                f"The host gave {size_text(self.pinned_bytes)} of pinned memory and refused more.",
                why=f"Offloaded activations need it ({str(error)[:200]}).",
                next_command="qwen3ft plan --set gradient_checkpointing=on",
                domain="host",
            ) from error

    def _copy_out(self, sources: list[Tensor], stashed: list[Stashed]) -> None:
        for source, each in zip(sources, stashed, strict=True):
            for slab, part in self._parts(each):
                slab.copy_(source[part], non_blocking=True)

    def _copy_back(self, stashed: Stashed) -> None:
        assert stashed.returned is not None
        target = stashed.returned.view(-1).view(torch.uint8)
        for slab, part in self._parts(stashed):
            target[part].copy_(slab, non_blocking=True)

    def _parts(self, stashed: Stashed) -> Iterator[tuple[Tensor, slice]]:
        """Yield pieces of slabs, and the bytes of the tensor in each."""
        position = stashed.start
        end = stashed.start + stashed.size_bytes
        while position < end:
            index, offset = divmod(position, self._slab_bytes)
            size = min(self._slab_bytes - offset, end - position)
            begin = position - stashed.start
            yield self._slabs[index][offset : offset + size], slice(begin, begin + size)
            position += size

    def _let_go(self, most: int) -> None:
        """Free the tensors copied out, except those of the newest `most` blocks."""
        while len(self._leaving) > most:
            _, left = self._leaving.popleft()
            torch.cuda.current_stream(self._device).wait_event(left)
