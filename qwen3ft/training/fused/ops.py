"""The element-wise functions of a Qwen3 block, as an interface with two implementations.

`TritonOps` runs on a GPU, each function in one pass over memory; `ReferenceOps` is plain torch on
any device. T stands for tokens. Products are in fp32 and rounded once, when they are stored.
Matrices and heads may be strided views with a dense last dimension.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from torch import Tensor

from qwen3ft.training.fused.weights import FourBitWeight


class ElementWise(Protocol):
    """Functions that a block and the loss are made of, besides matrix products and attention."""

    def dequantize(
        self,
        weights: Sequence[FourBitWeight],
        out: Tensor,
        beside: Tensor | None = None,
        below: Tensor | None = None,
    ) -> None:
        """Write `weights` of one input below each other into `out`.

        Args:
            weights: 4-bit weights, each (out_features, in_features).
            out: Target, with room for the two below.
            beside: Dense matrix to copy to the right of the weights' rows.
            below: Dense matrix to copy under their columns.
        """

    def rms_norm(self, x: Tensor, weight: Tensor, eps: float, out: Tensor) -> None:
        """Store weight x / rms(x), row by row of (T, hidden).

        Zhang and Sennrich 2019, arXiv:1910.07467.
        """

    def rms_norm_backward(
        self, d_out: Tensor, x: Tensor, weight: Tensor, eps: float, d_x: Tensor
    ) -> None:
        """Add to `d_x` the gradient of `rms_norm` with respect to x; `d_out` is its output's."""

    def norm_rotate(
        self, heads: Tensor, weight: Tensor, cos: Tensor, sin: Tensor, eps: float
    ) -> Tensor:
        """Return queries or keys for attention: RMS norm of each head, then rotation.

        Rotary embedding: Su et al. 2021, arXiv:2104.09864, in the half-split form of transformers.

        Args:
            heads: (T, heads, head_dim).
            weight: Weight of the norm, (head_dim,).
            cos: fp32, (T, head_dim / 2).
            sin: fp32, (T, head_dim / 2).
            eps: Epsilon of the norm.

        Returns:
            (T, heads, head_dim), dense.
        """

    def norm_rotate_backward(
        self, d_out: Tensor, heads: Tensor, weight: Tensor, cos: Tensor, sin: Tensor, eps: float
    ) -> None:
        """Overwrite `heads`, the input of `norm_rotate`, with its gradient.

        `d_out` is the gradient of the output, (T, heads, head_dim); the others are as before.
        """

    def silu_mul(self, gate_up: Tensor, out: Tensor) -> None:
        """Store silu(gate) x up (Shazeer 2020, arXiv:2002.05202).

        Args:
            gate_up: (T, 2 x intermediate): gate, then up.
            out: (T, intermediate).
        """

    def silu_mul_backward(self, d_out: Tensor, gate_up: Tensor) -> None:
        """Overwrite `gate_up` with its gradient, and `d_out` with the output of `silu_mul`.

        `d_out` is the gradient of the output, (T, intermediate).
        """

    def cross_entropy(self, logits: Tensor, targets: Tensor) -> Tensor:
        """Return each target's negative log-likelihood; overwrite `logits` with its gradient.

        Args:
            logits: (rows, vocabulary); afterwards softmax less one at the target.
            targets: int64, (rows,).

        Returns:
            fp32, (rows,), in nats.
        """
