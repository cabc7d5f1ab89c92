"""4-bit projections of one input, with the adapters of several models.

y = [x | m (x A')] [W | s B]', as in `qwen3ft.training.fused.projections`; A and B are those of all
adapters, and m is zero where a column's adapter is not that of the row's model. So the weights of
all models are read once for all rows.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from qwen3ft.planning.recompute import padded_rank
from qwen3ft.training.fused.ops import ElementWise
from qwen3ft.training.fused.weights import FourBitWeight

BASE = -1
"""Number of the model without an adapter; others are numbered in the order of their names."""

Foreign = dict[tuple[int, ...], Tensor]
"""From the owner of each column to a mask (rows, columns): True where the row has another model."""


class Scratch:
    """Memory for the largest dequantised weight; all projections use it in turn."""

    def __init__(self) -> None:
        self._numbers = 0
        self._memory: Tensor | None = None

    def reserve(self, numbers: int) -> None:
        """Make sure that `numbers` numbers fit; call it before the first `view`."""
        self._numbers = max(self._numbers, numbers)

    def view(self, rows: int, columns: int, like: Tensor) -> Tensor:
        """Return the memory as an uninitialised matrix."""
        if self._memory is None:
            self._memory = like.new_empty(self._numbers)
        return self._memory[: rows * columns].view(rows, columns)


class SwitchedProjection:
    """Projections of one input, in which each row has the adapter of its own model.

    Args:
        modules: PEFT's layers or plain 4-bit layers, which share their input.
        names: Adapters.
        ops: Element-wise functions for their device.
        scratch: Memory for the dequantised weight.
    """

    def __init__(
        self, modules: list[Any], names: Sequence[str], ops: ElementWise, scratch: Scratch
    ) -> None:
        layers = [getattr(module, "base_layer", module) for module in modules]
        self.modules, self.ops, self.scratch = modules, ops, scratch
        self.weights = [FourBitWeight.of(layer.weight) for layer in layers]
        self.in_features = self.weights[0].in_features
        self.out_features = sum(weight.out_features for weight in self.weights)
        parts = [
            (index, module.lora_A[name].weight, module.lora_B[name].weight, module.scaling[name])
            for index, name in enumerate(names)
            for module in modules
        ]
        rank = padded_rank(sum(len(down) for _, down, _, _ in parts))
        dtype, device = layers[0].compute_dtype, layers[0].weight.device
        self.a = torch.zeros(rank, self.in_features, dtype=dtype, device=device)
        self.b = torch.zeros(self.out_features, rank, dtype=dtype, device=device)
        self.owners = self._place(parts)
        self._resident: Tensor | None = None
        scratch.reserve(self.out_features * (self.in_features + rank))

    @property
    def rank(self) -> int:
        """Columns of all adapters."""
        return len(self.a)

    def _place(self, parts: list[tuple[int, Tensor, Tensor, float]]) -> tuple[int, ...]:
        """Copy A and s B of each adapter and module; return the owner of each column."""
        owners: list[int] = []
        for number, (index, down, up, scale) in enumerate(parts):
            self._put(len(owners), number % len(self.weights), down, up, scale)
            owners += [index] * len(down)
        # columns that only pad are zero and may have any owner
        return (*owners, *[BASE] * (self.rank - len(owners)))

    def _put(self, column: int, module: int, down: Tensor, up: Tensor, scale: float) -> None:
        """Copy A and s B of one module's adapter, from `column` on."""
        row = sum(weight.out_features for weight in self.weights[:module])
        columns = slice(column, column + len(down))
        self.a[columns] = down.detach()
        self.b[row : row + len(up), columns] = up.detach() * scale

    def replace(self, index: int, name: str) -> None:
        """Copy the modules' adapter `name` over that of number `index`, whose rank it may not pass.

        Shapes and addresses stay, and so does what was captured.
        """
        owned = [column for column, owner in enumerate(self.owners) if owner == index]
        places = len(owned) // len(self.modules)
        self.a[owned], self.b[:, owned] = 0, 0
        for number, module in enumerate(self.modules):
            down = module.lora_A[name].weight
            assert len(down) <= places
            up, scale = module.lora_B[name].weight, module.scaling[name]
            self._put(owned[number * places], number, down, up, scale)
        if self._resident is not None:
            self._resident[:, self.in_features :] = self.b

    def keep_resident(self) -> None:
        """Keep the dequantised weight from now on."""
        self._resident = self.a.new_empty(self.out_features, self.in_features + self.rank)
        self.ops.dequantize(self.weights, self._resident, beside=self.b)

    def weight(self) -> Tensor:
        """Return [W | s B], (out, in + rank), valid until the next call of any projection."""
        if self._resident is not None:
            return self._resident
        full = self.scratch.view(self.out_features, self.in_features + self.rank, self.a)
        self.ops.dequantize(self.weights, full, beside=self.b)
        return full

    def new_input(self, rows: int) -> Tensor:
        """Allocate [x | x A'], (rows, in + rank), uninitialised."""
        return self.a.new_empty(rows, self.in_features + self.rank)

    def product(
        self,
        extended: Tensor,
        foreign: Foreign,
        *,
        residual: Tensor | None = None,
        out: Tensor | None = None,
    ) -> Tensor:
        """Return y, or residual + y, (rows, out).

        Args:
            extended: A `new_input` that holds x; the rest is written here.
            foreign: Masks of the rows; no mask for these columns if all rows have one model.
            residual: (rows, out), added before the sum is rounded.
            out: Where to write it; may be `residual`.
        """
        x, low = extended[:, : self.in_features], extended[:, self.in_features :]
        torch.mm(x, self.a.t(), out=low)
        if (mask := foreign.get(self.owners)) is not None:
            low.masked_fill_(mask, 0)
        weight = self.weight().t()
        if residual is None:
            return torch.mm(extended, weight, out=out)
        return torch.addmm(residual, extended, weight, out=out)


class Switch:
    """Masks for rows of given models; what they are compared with is on the device beforehand.

    Args:
        projections: All projections that rows pass through.
    """

    def __init__(self, projections: Sequence[SwitchedProjection]) -> None:
        device = projections[0].a.device
        self._columns = {
            owners: torch.tensor(owners, device=device)
            for owners in {projection.owners for projection in projections}
        }

    def masks(self, models: Tensor) -> Foreign:
        """Return the masks for rows of `models`, int64, (rows,)."""
        return {
            owners: columns[None, :] != models[:, None] for owners, columns in self._columns.items()
        }
