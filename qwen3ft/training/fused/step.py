"""Loss and adapter gradients of one packed row, as one autograd function.

To autograd the whole model is one operation from the adapters' parameters to a loss, so this module
decides what is kept and when it is freed. The gradient of the head is computed with the loss, chunk
by chunk (Liger, Hsu et al. 2024, arXiv:2410.10989), so logits are never kept.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from qwen3ft.planning.fused_sizes import MOST_GRAPHS
from qwen3ft.planning.recompute import Level
from qwen3ft.training.fused.attention import Segments
from qwen3ft.training.fused.block import FusedBlock, PackedRow
from qwen3ft.training.fused.graphs import Buffers, RowGraph, RowSize, size_of
from qwen3ft.training.fused.kept import Kept
from qwen3ft.training.fused.offload import HostStash
from qwen3ft.training.fused.ops import ElementWise

ChooseLevels = Callable[[int], tuple[Level, ...]]
"""From the tokens of a packed row to the level of each block."""


@dataclass
class _Pass:
    """State of a forward, for its backward."""

    row: PackedRow
    kept: list[Kept]
    d_extended: Tensor
    graph: RowGraph | None = None
    """Graph that ran the forward; it then has all the rest."""


class FusedStep:
    """Forward and backward of `model`, a PEFT model over a 4-bit `Qwen3ForCausalLM`.

    The parameters remain the model's own, and are read at each call.

    Args:
        model: Model with one active adapter on all seven projections, without dropout or bias.
        ops: Element-wise functions for its device.
        choose_levels: Levels of all blocks for a row.
        loss_chunk_tokens: Targets whose logits exist at a time.
        chunk_tokens: Tokens whose wide intermediates exist at a time.
        head_groups: Number of parts in which attention is computed.
        offload: Offload what blocks keep to host memory.
        graph_tokens: Longest row that runs as CUDA graphs (`fused.graphs`); 0 for no graphs. Levels
            must keep all on the device.
    """

    def __init__(
        self,
        model: Any,
        ops: ElementWise,
        choose_levels: ChooseLevels,
        *,
        loss_chunk_tokens: int,
        chunk_tokens: int,
        head_groups: int = 1,
        offload: bool = False,
        graph_tokens: int = 0,
    ) -> None:
        base = model.get_base_model()
        self.ops = ops
        self.choose_levels = choose_levels
        self.loss_chunk_tokens = loss_chunk_tokens
        self.chunk_tokens = chunk_tokens
        self.head_groups = head_groups
        self.embedding, self.head = base.model.embed_tokens.weight, base.lm_head.weight
        self.offload = offload
        self.stash = HostStash(self.embedding.device)
        self.norm, self.rotary = base.model.norm, base.model.rotary_emb
        self.blocks = [FusedBlock(block, ops) for block in base.model.layers]
        self.graph_tokens = graph_tokens
        self._graphs: dict[RowSize, RowGraph] = {}
        self._buffers: Buffers | None = None
        groups = [group for block in self.blocks for group in block.groups]
        self.parameters = [parameter for group in groups for parameter in group.parameters]
        self._sizes = [parameter.numel() for parameter in self.parameters]
        self.factors = [
            factor for group in groups for _ in group.down for factor in (1.0, group.scale)
        ]
        # As lists for all blocks: one call per small tensor would take longer than the copies.
        self._a, self._b = self.parameters[0::2], self.parameters[1::2]
        self._a_copies = [a for group in groups for a in group.copies[0]]
        self._b_copies = [b for group in groups for b in group.copies[1]]

    def __call__(self, batch: dict[str, Any]) -> Tensor:
        """Return the summed negative log-likelihood in nats, a differentiable fp32 scalar.

        Args:
            batch: A batch of `qwen3ft.training.batches.PackedCollator`, on the host or the device.
        """
        if not torch.is_grad_enabled():
            return self._evaluate(batch)
        loss: Tensor = _Step.apply(self, batch, *self.parameters)  # type: ignore[no-untyped-call]
        return loss

    def forward(self, batch: dict[str, Any]) -> tuple[Tensor, _Pass]:
        """Return the loss and the state for `backward`."""
        hidden, row = self._enter(batch)
        if len(hidden) <= self.graph_tokens:
            assert not any(each.waits_for_backward for each in self._graphs.values())
            graph = self._graph_of(size_of(row))
            loss = self._loss(graph.forward(hidden, row), batch, graph.d_extended)
            return loss, _Pass(row, [], graph.d_extended, graph)
        start = [hidden]
        del hidden
        kept, out = self._run(start, row)
        d_extended = self._new_gradient(out)
        loss = self._loss(out, batch, d_extended)
        return loss, _Pass(row, kept, d_extended)

    def backward(self, state: _Pass, factor: Tensor) -> list[Tensor]:
        """Return `factor` times the gradients of `parameters`, in fp32."""
        if state.graph is not None:
            parts = torch.split(state.graph.backward(factor), self._sizes)
            return [part.view_as(p) for part, p in zip(parts, self.parameters, strict=True)]
        gradients = self._run_back(state.kept, state.d_extended, state.row)
        torch._foreach_mul_(gradients, factor)
        return gradients

    def _run(
        self, start: list[Tensor], row: PackedRow, out: Tensor | None = None
    ) -> tuple[list[Kept], Tensor]:
        """Run all blocks; return what they keep, and the last one's output, in `out` if given.

        `start` has the embedded tokens, (T, hidden), and is emptied: a caller that held them would
        keep them on the device when the first block's input is offloaded.
        """
        x = start.pop()
        levels = self.choose_levels(len(x))
        kept = [
            block.reserve(len(x), row, level)
            for block, level in zip(self.blocks, levels, strict=True)
        ]
        # All at once, for the reason given in `FusedBlock.reserve`.
        outputs = [None if self.offload else torch.empty_like(x) for _ in self.blocks[1:]]
        last = torch.empty_like(x) if out is None and not self.offload else out
        hidden = x
        for block, level, of_block, output in zip(
            self.blocks, levels, kept, [*outputs, last], strict=True
        ):
            x, hidden = hidden, torch.empty_like(hidden) if output is None else output
            if level == Level.OFFLOAD_GATE_UP:
                self.stash.settle()  # free the last block's before allocating as much again
                of_block.gate_up = block.reserve_gate_up(row)
            block.forward(x, row, level, of_block, hidden)
            if self.offload:
                of_block.offload(self.stash, ("x", "attended", "log_sum_exp", "x_mid", "qkv"))
            elif level == Level.OFFLOAD_GATE_UP:
                of_block.offload(self.stash, ("gate_up",))
        return kept, hidden

    def _run_back(self, of_blocks: list[Kept], d_extended: Tensor, row: PackedRow) -> list[Tensor]:
        """Return the gradients of `parameters`, those of the summed loss; empty `of_blocks`."""
        gradients: list[Tensor] = []
        self.stash.settle()
        waiting = [kept for kept in of_blocks if kept.offloaded]
        if waiting:
            waiting[-1].fetch(self.stash)
        for block in reversed(self.blocks):
            kept = of_blocks.pop()
            if kept.offloaded:
                kept.take_back(self.stash)
                waiting.pop()
                if waiting:  # copied back while the blocks before it run
                    waiting[-1].fetch(self.stash)
            gradients[:0] = block.backward(d_extended, kept, row)
        torch._foreach_mul_(gradients, self.factors)
        return gradients

    def _new_gradient(self, out: Tensor) -> Tensor:
        """Return zeros for the gradient of `out`, with room for products with the adapters."""
        return out.new_zeros(len(out), out.shape[1] + self.blocks[-1].down.rank)

    def record(self, sizes: Iterable[RowSize]) -> None:
        """Record the graphs of rows of these sizes; others are recorded at their first row."""
        for size in sizes:
            self._graph_of(size)

    def _graph_of(self, size: RowSize) -> RowGraph:
        graph = self._graphs.pop(size, None)
        if graph is None:
            if self._buffers is None:
                self._buffers = self._new_buffers()
                self._pool = torch.cuda.graph_pool_handle()
            if len(self._graphs) >= MOST_GRAPHS:
                del self._graphs[next(iter(self._graphs))]
            graph = RowGraph(size, self._buffers, self.chunk_tokens, self.head_groups)
            # Loads the kernels for rows of this length, which a recording must not.
            self._try_block(graph.row)
            graph.record(self._pool, self._run, self._run_back)
        self._graphs[size] = graph  # the last used last
        return graph

    def _try_block(self, row: PackedRow) -> None:
        """Run one block there and back over a row of zeros, with every kernel of any level."""
        block, level = self.blocks[0], Level.RECOMPUTE_ALL
        x = self.embedding.new_zeros(len(row.cos), self.embedding.shape[1])
        kept, out = block.reserve(len(x), row, level), torch.empty_like(x)
        block.forward(x, row, level, kept, out)
        block.backward(self._new_gradient(out), kept, row)

    def _new_buffers(self) -> Buffers:
        tokens, half = self.graph_tokens, self.rotary.inv_freq.numel()
        x = self.embedding.new_empty(tokens, self.embedding.shape[1])
        return Buffers(
            x=x,
            cos=x.new_empty(tokens, half, dtype=torch.float32),
            sin=x.new_empty(tokens, half, dtype=torch.float32),
            out=torch.empty_like(x),
            d_extended=self._new_gradient(x),
            gradients=x.new_empty(sum(self._sizes), dtype=torch.float32),
        )

    def _evaluate(self, batch: dict[str, Any]) -> Tensor:
        hidden, row = self._enter(batch)
        for block in self.blocks:
            x, hidden = hidden, torch.empty_like(hidden)
            block.forward(x, row, Level.RECOMPUTE_ALL, Kept(None), hidden)
        return self._loss(hidden, batch, None)

    def _enter(self, batch: dict[str, Any]) -> tuple[Tensor, PackedRow]:
        """Return the embedded tokens, (T, hidden), and the row that all blocks share."""
        device = self.embedding.device
        self._read_adapters()
        positions = batch["position_ids"].to(device, non_blocking=True)
        half = self.rotary.inv_freq.numel()
        # transformers takes only device and dtype of the first argument; both halves are the same.
        cos, sin = self.rotary(self.norm.weight.float(), positions)
        row = PackedRow(
            segments=Segments(
                batch["cu_seqlens"].to(device, non_blocking=True),
                batch["max_length"],
                tuple(batch["cu_seqlens"].tolist()),
            ),
            cos=cos[0, :, :half].contiguous(),
            sin=sin[0, :, :half].contiguous(),
            chunk_tokens=self.chunk_tokens,
            head_groups=self.head_groups,
        )
        ids = batch["input_ids"].to(device, non_blocking=True)[0]
        return torch.nn.functional.embedding(ids, self.embedding), row

    def _read_adapters(self) -> None:
        """Copy the parameters in the dtype of the products, with B times its factor."""
        torch._foreach_copy_(self._a_copies, self._a)
        torch._foreach_copy_(self._b_copies, torch._foreach_mul(self._b, self.factors[1::2]))

    def _loss(self, hidden: Tensor, batch: dict[str, Any], d_extended: Tensor | None) -> Tensor:
        """Return the summed loss; write its gradient with respect to `hidden` into `d_extended`."""
        rows, targets = (
            batch[name].to(hidden.device, non_blocking=True)
            for name in ("target_positions", "targets")
        )
        total = torch.zeros((), dtype=torch.float32, device=hidden.device)
        norm, eps = self.norm.weight, self.norm.variance_epsilon
        # Allocated once for all chunks: a new one would not fit into the place of the last, which
        # smaller tensors have taken by then.
        room = hidden.new_empty(min(len(rows), self.loss_chunk_tokens), len(self.head))
        for start in range(0, len(rows), self.loss_chunk_tokens):
            chunk = rows[start : start + self.loss_chunk_tokens]
            last = hidden[chunk]
            normed = torch.empty_like(last)
            self.ops.rms_norm(last, norm, eps, normed)
            logits = torch.mm(normed, self.head.t(), out=room[: len(chunk)])
            total += self.ops.cross_entropy(logits, targets[start : start + len(chunk)]).sum()
            if d_extended is not None:
                d_last = torch.zeros_like(last)
                self.ops.rms_norm_backward(logits @ self.head, last, norm, eps, d_last)
                d_extended[:, : hidden.shape[1]].index_copy_(0, chunk, d_last)
        return total


class _Step(torch.autograd.Function):
    """`FusedStep` as an autograd function."""

    @staticmethod
    def forward(ctx: Any, step: FusedStep, batch: dict[str, Any], *_: Tensor) -> Tensor:
        """Return the loss."""
        loss, state = step.forward(batch)
        ctx.step, ctx.state = step, state
        return loss

    @staticmethod
    def backward(ctx: Any, *d_loss: Tensor) -> tuple[Tensor | None, ...]:
        """Return None for step and batch, then one gradient per parameter."""
        step, state = ctx.step, ctx.state
        ctx.state = None
        return None, None, *step.backward(state, d_loss[0])
