"""Frozen 4-bit projections with low-rank adapters: products and gradients.

y = x W' + s (x A') B' (LoRA, Hu et al. 2021, arXiv:2106.09685; ' transposes, s = alpha / r). W is
dequantised once per pass. The adapter's products are computed with W's, as a few more columns or
rows of the dequantised matrix, because reading a wide activation again would cost more:

- `SharedInput`, projections of one input (q, k, v; gate, up): the input is stored as [x | x A'],
  the weight as [W | s B], so one product gives y, and dy [W | s B] = [dx of W | d(x A')].
- `SingleProjection` (o; down), wide in and narrow out: the gradient is stored as [dy | dy s B],
  the weight as [W ; A] below each other, so one product gives all of dx.

Ranks are zero-padded (`padded_rank`). Gradients of A and B are summed in fp32; those of B lack the
factor s.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from qwen3ft.planning.recompute import padded_rank
from qwen3ft.training.fused.ops import ElementWise
from qwen3ft.training.fused.weights import FourBitWeight


@dataclass
class AdapterGradient:
    """Gradients of A, (rank, in), and B, (out, rank), summed over chunks of tokens in fp32."""

    a: Tensor | None = None
    b: Tensor | None = None

    def add(self, a: Tensor, b: Tensor) -> None:
        """Add the gradients of one chunk."""
        self.a = a if self.a is None else self.a.add_(a)
        self.b = b if self.b is None else self.b.add_(b)


class _Adapted:
    """Weights and adapters of PEFT's `modules`, which share their input.

    Raises:
        ValueError: one of them is not plain LoRA on a 4-bit weight.
    """

    def __init__(self, modules: list[Any], ops: ElementWise) -> None:
        for module in modules:
            _require_plain_lora(module)
        self.ops = ops
        self.weights = [FourBitWeight.of(module.base_layer.weight) for module in modules]
        names = [module.active_adapters[0] for module in modules]
        pairs = list(zip(modules, names, strict=True))
        self.down = [module.lora_A[name].weight for module, name in pairs]
        self.up = [module.lora_B[name].weight for module, name in pairs]
        self.scale, *others = {module.scaling[name] for module, name in pairs}
        if others:
            raise ValueError("The adapters of projections with one input have different scales.")
        self.in_features = self.weights[0].in_features
        self.out_features = sum(weight.out_features for weight in self.weights)
        self.rank = padded_rank(sum(len(down) for down in self.down))
        dtype, device = modules[0].base_layer.compute_dtype, self.down[0].device
        # A of all modules below each other; s B of all, block-diagonal.
        self.a = torch.zeros(self.rank, self.in_features, dtype=dtype, device=device)
        self.b = torch.zeros(self.out_features, self.rank, dtype=dtype, device=device)
        self._places = self._places_of_blocks()

    @property
    def parameters(self) -> list[Tensor]:
        """A and B of each projection, in the order of `gradients`."""
        return [p for pair in zip(self.down, self.up, strict=True) for p in pair]

    @property
    def copies(self) -> tuple[list[Tensor], list[Tensor]]:
        """A and s B of each projection, as views of `a` and `b`."""
        return self._blocks(self.a, self.b)

    def gradients(self, total: AdapterGradient) -> list[Tensor]:
        """Return the gradients of `parameters`; those of B lack the factor `scale`."""
        assert total.a is not None
        assert total.b is not None
        pairs = zip(*self._blocks(total.a, total.b), strict=True)
        return [part.contiguous() for pair in pairs for part in pair]

    def _blocks(self, a: Tensor, b: Tensor) -> tuple[list[Tensor], list[Tensor]]:
        """Return each projection's rows of `a` and block of `b`."""
        return [a[ranks] for ranks, _ in self._places], [
            b[rows, ranks] for ranks, rows in self._places
        ]

    def _places_of_blocks(self) -> list[tuple[slice, slice]]:
        """Return each projection's ranks, rows of `a` and columns of `b`, and its rows of `b`."""
        places, rank, row = [], 0, 0
        for down, up in zip(self.down, self.up, strict=True):
            places.append((slice(rank, rank + len(down)), slice(row, row + len(up))))
            rank, row = rank + len(down), row + len(up)
        return places


class SharedInput(_Adapted):
    """Projections of one narrow input to wide outputs: q, k, v, or gate, up."""

    def new_input(self, tokens: int) -> Tensor:
        """Allocate [x | x A'], (tokens, in + rank), uninitialised."""
        return self.a.new_empty(tokens, self.in_features + self.rank)

    def weight(self) -> Tensor:
        """Dequantise to [W | s B], (out, in + rank)."""
        full = self.a.new_empty(self.out_features, self.in_features + self.rank)
        self.ops.dequantize(self.weights, full, beside=self.b)
        return full

    def extend(self, extended: Tensor) -> None:
        """Write x A' to the right of x."""
        x, low = self._split(extended)
        torch.mm(x, self.a.t(), out=low)

    def forward(self, extended: Tensor, weight: Tensor, out: Tensor | None = None) -> Tensor:
        """Return y, (tokens, out); call `extend` first."""
        return torch.mm(extended, weight.t(), out=out)

    def backward(
        self, d_out: Tensor, extended: Tensor, weight: Tensor, total: AdapterGradient
    ) -> Tensor:
        """Add the adapters' gradients to `total`; return dx, (tokens, in), a view."""
        x, low = self._split(extended)
        d_x, d_low = self._split(d_out @ weight)
        total.add(_sum_fp32(d_low.t(), x), _sum_fp32(d_out.t(), low))
        return d_x.addmm_(d_low, self.a)

    def _split(self, extended: Tensor) -> tuple[Tensor, Tensor]:
        return extended[:, : self.in_features], extended[:, self.in_features :]


class SingleProjection(_Adapted):
    """One projection back to the residual stream: o, or down."""

    def weight(self) -> Tensor:
        """Dequantise to [W ; A], (out + rank, in)."""
        full = self.a.new_empty(self.out_features + self.rank, self.in_features)
        self.ops.dequantize(self.weights, full, below=self.a)
        return full

    def forward(
        self, x: Tensor, weight: Tensor, residual: Tensor, out: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """Return residual + y, (tokens, out), and x A', (tokens, rank)."""
        low = x @ self.a.t()
        # The adapter's part comes first: added to a rounded sum, it would vanish while it is below
        # half a unit in the last place of that sum.
        result = torch.mm(low, self.b.t(), out=out)
        result.addmm_(x, weight[: self.out_features].t())
        return result.add_(residual), low

    def input_gradient(self, d_extended: Tensor, weight: Tensor) -> Tensor:
        """Write dy s B to the right of dy, and return dx, (tokens, in)."""
        d_out, d_low = self._split(d_extended)
        torch.mm(d_out, self.b, out=d_low)
        return d_extended @ weight

    def adapter_gradient(
        self, d_extended: Tensor, x: Tensor, low: Tensor, total: AdapterGradient
    ) -> None:
        """Add the adapter's gradients to `total`; call `input_gradient` first."""
        d_out, d_low = self._split(d_extended)
        total.add(_sum_fp32(d_low.t(), x), _sum_fp32(d_out.t(), low))

    def _split(self, d_extended: Tensor) -> tuple[Tensor, Tensor]:
        return d_extended[:, : self.out_features], d_extended[:, self.out_features :]


def _require_plain_lora(module: Any) -> None:
    """Raise ValueError unless `module` computes W x + s B A x with one adapter."""
    names = module.active_adapters
    if len(names) != 1:
        raise ValueError(f"{len(names)} adapters are active; the fused path supports one.")
    (name,) = names
    unlike = {
        "merged": module.merged,
        "a variant of LoRA": name in module.lora_variant,
        "with dropout": not isinstance(module.lora_dropout[name], torch.nn.Identity),
        "with a bias": module.base_layer.bias is not None or module.lora_B[name].bias is not None,
    }
    if wrong := [what for what, is_so in unlike.items() if is_so]:
        raise ValueError(f"The adapter is {', '.join(wrong)}; the fused path supports plain LoRA.")


def _sum_fp32(left: Tensor, right: Tensor) -> Tensor:
    """Multiply with fp32 sums, for products that sum over many tokens."""
    if left.is_cuda and left.dtype != torch.float32:
        return torch.mm(left, right, out_dtype=torch.float32)  # CUDA alone has out_dtype
    return (left @ right).float()
