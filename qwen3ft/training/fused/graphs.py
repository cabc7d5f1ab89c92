"""CUDA graphs of a row's forward and backward: thousands of launches as two.

Where rows are short, the GPU computes faster than the host launches: a row of 3,500 tokens of the
4B shape keeps an H200 busy for 120 ms, in 3,300 kernels that take as long to launch. A graph is
launched at once. Each is recorded for one size of rows (`RowSize`), which are padded to few lengths
(`qwen3ft.planning.packing.row_tokens`).

All graphs share one pool of memory, in which a row's tensors lie as they do without graphs; what
passes into and out of a graph lies outside, once for all of them. So the backward of a row comes
before the next row's forward. Kernels and results are the same as without graphs.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from qwen3ft.planning.packing import row_bounds, row_tokens
from qwen3ft.training.fused.attention import Segments
from qwen3ft.training.fused.block import PackedRow
from qwen3ft.training.fused.kept import Kept

LEAST_LONGEST_TOKENS = 256
"""Least `longest` of a `RowSize`; the next is four times as much, so that there are few sizes."""


class RowSize(NamedTuple):
    """Numbers that all rows of a graph have in common."""

    tokens: int
    """Slots of the row."""
    bounds: int
    """Bounds of its sequences; those that a row lacks have no token."""
    longest: int
    """Tokens that attention takes for those of the longest sequence."""


def row_size(lengths: Sequence[int]) -> RowSize:
    """Return the size of a row of sequences of these lengths in tokens."""
    real = sum(lengths)
    tokens = row_tokens(real, graphs=True)
    # Padding is a sequence, too (`qwen3ft.training.batches.PackedCollator`).
    sequences = len(lengths) + (tokens > real)
    return _size(tokens, sequences, max(*lengths, tokens - real))


def size_of(row: PackedRow) -> RowSize:
    """Return the size of a packed row."""
    segments = row.segments
    return _size(len(row.cos), len(segments.host_bounds) - 1, segments.longest)


def _size(tokens: int, sequences: int, longest_tokens: int) -> RowSize:
    longest = LEAST_LONGEST_TOKENS
    while longest < longest_tokens:
        longest *= 4
    return RowSize(tokens, row_bounds(sequences, graphs=True), longest)


@dataclass(frozen=True)
class Buffers:
    """Tensors that pass into and out of graphs, for rows of up to T tokens."""

    x: Tensor
    """Embedded tokens, (T, hidden)."""
    cos: Tensor
    """fp32, (T, head_dim / 2)."""
    sin: Tensor
    """fp32, (T, head_dim / 2)."""
    out: Tensor
    """Output of the last block, (T, hidden)."""
    d_extended: Tensor
    """Its gradient, with room for products with adapters, (T, hidden + rank)."""
    gradients: Tensor
    """Gradients of all adapters one after the other, fp32."""


Forward = Callable[[list[Tensor], PackedRow, Tensor], tuple[list[Kept], Tensor]]
"""From a list with the embedded tokens, which it empties, the row, and the place for the last
block's output, to what blocks keep and that output."""

Backward = Callable[[list[Kept], Tensor, PackedRow], list[Tensor]]
"""From what they keep, the output's gradient and the row to the adapters' gradients."""


class RowGraph:
    """Forward and backward of rows of one size; `record` comes first.

    Args:
        size: What the rows have in common.
        buffers: What passes in and out.
        chunk_tokens: Tokens whose wide intermediates exist at a time.
        head_groups: Number of parts in which attention is computed.
    """

    def __init__(
        self, size: RowSize, buffers: Buffers, chunk_tokens: int, head_groups: int
    ) -> None:
        tokens = size.tokens
        self._x, self._out = buffers.x[:tokens], buffers.out[:tokens]
        self.d_extended, self._gradients = buffers.d_extended[:tokens], buffers.gradients
        count, device = torch.arange(size.bounds), buffers.x.device
        # Until a row is there: sequences of about the same length.
        bounds = (count * -(-tokens // (size.bounds - 1))).clamp(max=tokens)
        self.row = PackedRow(
            # Without bounds on the host: sequences for cuDNN's kernels are longer than such rows.
            Segments(bounds.to(device, torch.int32), size.longest, (0,)),
            buffers.cos[:tokens],
            buffers.sin[:tokens],
            chunk_tokens,
            head_groups,
        )
        self._forward, self._backward = torch.cuda.CUDAGraph(), torch.cuda.CUDAGraph()
        self.waits_for_backward = False

    def record(self, pool: Any, forward: Forward, backward: Backward) -> None:
        """Record what runs all blocks, and what runs them back, in the memory of `pool`."""
        with _recording(self._forward, pool):
            self.d_extended.zero_()
            kept, _ = forward([self._x], self.row, self._out)
        with _recording(self._backward, pool):
            gradients = backward(kept, self.d_extended, self.row)
            views = torch.split(self._gradients, [each.numel() for each in gradients])
            torch._foreach_copy_(list(views), [each.view(-1) for each in gradients])

    def forward(self, x: Tensor, row: PackedRow) -> Tensor:
        """Return the output of the last block, (T, hidden); valid until the next forward."""
        self._x.copy_(x)
        self.row.cos.copy_(row.cos)
        self.row.sin.copy_(row.sin)
        own, bounds = self.row.segments.bounds, row.segments.bounds
        missing = len(own) - len(bounds)
        own.copy_(torch.nn.functional.pad(bounds, (0, missing), value=len(x)))
        self._forward.replay()
        self.waits_for_backward = True
        return self._out

    def backward(self, factor: Tensor) -> Tensor:
        """Return `factor` times the gradients of all adapters, fp32, one after the other."""
        self._backward.replay()
        self.waits_for_backward = False
        return self._gradients * factor


@contextmanager
def _recording(graph: torch.cuda.CUDAGraph, pool: Any) -> Iterator[None]:
    cause = None
    try:
        # Other threads write checkpoints and watch NCCL meanwhile: their calls are no mistake.
        with torch.cuda.graph(graph, pool=pool, capture_error_mode="thread_local"):
            try:
                yield
            except torch.OutOfMemoryError as error:
                cause = error
                raise
    except Exception:
        if cause is not None:  # what ends a recording may fail too, with an error of its own
            raise cause from None
        raise
