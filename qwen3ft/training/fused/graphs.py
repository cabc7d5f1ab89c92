"""CUDA graphs of a row's forward and backward: thousands of launches as two.

Where rows are short, the GPU computes faster than the host launches: a row of 3,500 tokens of the
4B shape keeps an H200 busy for 120 ms, in 3,300 kernels that take as long to launch. A graph is
launched at once. Each is recorded for one length of a row and a number of sequences, and rows are
padded to few lengths (`qwen3ft.planning.packing.row_tokens`).

All graphs share one pool of memory, in which a row's tensors lie as they do without graphs; what
passes into and out of a graph lies outside, once for all of them. Kernels and results are the same
as without graphs.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from qwen3ft.planning.packing import next_power_of_2
from qwen3ft.training.fused.attention import Segments
from qwen3ft.training.fused.block import PackedRow
from qwen3ft.training.fused.kept import Kept

LEAST_BOUNDS, LEAST_LONGEST_TOKENS = 16, 256
"""Fewest bounds of sequences in a graph, and the least that attention takes for the longest one's
length. From there on both are powers of 2; sequences that a row lacks have no token."""


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


Forward = Callable[[Tensor, PackedRow, Tensor], list[Kept]]
"""From embedded tokens, the row and the target for its output to what the blocks keep."""

Backward = Callable[[list[Kept], Tensor, PackedRow], list[Tensor]]
"""From what they keep, the output's gradient and the row to the adapters' gradients."""


class RowGraph:
    """Forward and backward of rows of one length.

    Args:
        row: A row of that length.
        buffers: What passes in and out.
        pool: The memory of all graphs.
        forward: Runs all blocks.
        backward: Runs them back.
    """

    def __init__(
        self,
        row: PackedRow,
        buffers: Buffers,
        pool: Any,
        forward: Forward,
        backward: Backward,
    ) -> None:
        tokens, bounds, longest = self.key(row)
        self._tokens = tokens
        self._x, self._cos, self._sin = (
            buffers.x[:tokens],
            buffers.cos[:tokens],
            buffers.sin[:tokens],
        )
        self.out, self.d_extended = buffers.out[:tokens], buffers.d_extended[:tokens]
        self.gradients = buffers.gradients
        self._bounds = torch.full((bounds,), tokens, dtype=torch.int32, device=row.cos.device)
        own = PackedRow(
            # Without bounds on the host: sequences for cuDNN's kernels are longer than such rows.
            Segments(self._bounds, longest, (0,)),
            self._cos,
            self._sin,
            row.chunk_tokens,
            row.head_groups,
        )
        self._forward, self._backward = torch.cuda.CUDAGraph(), torch.cuda.CUDAGraph()
        with self._recording(self._forward, pool):
            self.d_extended.zero_()
            kept = forward(self._x, own, self.out)
        with self._recording(self._backward, pool):
            gradients = backward(kept, self.d_extended, own)
            views = torch.split(self.gradients, [each.numel() for each in gradients])
            torch._foreach_copy_(list(views), [each.view(-1) for each in gradients])

    @staticmethod
    def key(row: PackedRow) -> tuple[int, int, int]:
        """Return what the rows of a graph have in common."""
        bounds = max(LEAST_BOUNDS, next_power_of_2(len(row.segments.host_bounds)))
        longest = max(LEAST_LONGEST_TOKENS, next_power_of_2(row.segments.longest))
        return len(row.cos), bounds, longest

    @staticmethod
    def _recording(graph: torch.cuda.CUDAGraph, pool: Any) -> torch.cuda.graph:
        # Other threads write checkpoints and watch NCCL meanwhile: their calls are no mistake.
        return torch.cuda.graph(graph, pool=pool, capture_error_mode="thread_local")

    def forward(self, x: Tensor, row: PackedRow) -> Tensor:
        """Return the output of the last block, (T, hidden); valid until the next forward."""
        self._x.copy_(x)
        self._cos.copy_(row.cos)
        self._sin.copy_(row.sin)
        bounds = row.segments.bounds
        missing = len(self._bounds) - len(bounds)
        self._bounds.copy_(torch.nn.functional.pad(bounds, (0, missing), value=self._tokens))
        self._forward.replay()
        return self.out

    def backward(self, factor: Tensor) -> Tensor:
        """Return `factor` times the gradients of all adapters, fp32, one after the other."""
        self._backward.replay()
        return self.gradients * factor
