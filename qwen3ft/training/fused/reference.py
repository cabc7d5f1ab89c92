"""`qwen3ft.training.fused.ops` in plain torch."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from qwen3ft.training.fused.weights import FourBitWeight


class ReferenceOps:
    """`ElementWise` in plain torch, for CPUs and as the truth in tests."""

    @staticmethod
    def dequantize(
        weights: Sequence[FourBitWeight],
        out: Tensor,
        beside: Tensor | None = None,
        below: Tensor | None = None,
    ) -> None:
        """Write code x constant of each block (see `FourBitWeight`)."""
        columns, row = weights[0].in_features, 0
        for weight in weights:
            _dequantize_one(weight, out[row : row + weight.out_features, :columns])
            row += weight.out_features
        if beside is not None:
            out[:row, columns : columns + beside.shape[1]] = beside
        if below is not None:
            out[row : row + len(below), :columns] = below

    @staticmethod
    def rms_norm(x: Tensor, weight: Tensor, eps: float, out: Tensor) -> None:
        """Store weight x / rms(x)."""
        wide = x.float()
        out.copy_(wide * _inverse_rms(wide, eps) * weight.float())

    @staticmethod
    def rms_norm_backward(
        d_out: Tensor, x: Tensor, weight: Tensor, eps: float, d_x: Tensor
    ) -> None:
        """Add the gradient with respect to x to `d_x`."""
        d_x += _norm_gradient(d_out.float(), x.float(), weight.float(), eps)

    @staticmethod
    def norm_rotate(heads: Tensor, weight: Tensor, cos: Tensor, sin: Tensor, eps: float) -> Tensor:
        """Return normed and rotated heads."""
        wide = heads.float()
        first, second = (wide * _inverse_rms(wide, eps) * weight.float()).chunk(2, dim=-1)
        cos, sin = cos[:, None], sin[:, None]
        rotated = torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1)
        return rotated.to(heads.dtype)

    @staticmethod
    def norm_rotate_backward(
        d_out: Tensor, heads: Tensor, weight: Tensor, cos: Tensor, sin: Tensor, eps: float
    ) -> None:
        """Overwrite `heads` with its gradient."""
        first, second = d_out.float().chunk(2, dim=-1)
        cos, sin = cos[:, None], sin[:, None]
        d_normed = torch.cat((first * cos + second * sin, second * cos - first * sin), dim=-1)
        heads.copy_(_norm_gradient(d_normed, heads.float(), weight.float(), eps))

    @staticmethod
    def silu_mul(gate_up: Tensor, out: Tensor) -> None:
        """Store silu(gate) x up."""
        gate, up = gate_up.float().chunk(2, dim=-1)
        out.copy_(torch.nn.functional.silu(gate) * up)

    @staticmethod
    def silu_mul_backward(d_out: Tensor, gate_up: Tensor) -> None:
        """Overwrite `gate_up` with its gradient, and `d_out` with the output."""
        gate, up = gate_up.float().chunk(2, dim=-1)
        gradient, sigmoid = d_out.float(), torch.sigmoid(gate)
        silu = gate * sigmoid
        d_gate = gradient * up * (sigmoid + silu * (1 - sigmoid))
        # Both before either is stored: in fp32 these are views of what is overwritten.
        d_gate_up, activated = torch.cat((d_gate, gradient * silu), dim=-1), silu * up
        d_out.copy_(activated)
        gate_up.copy_(d_gate_up)

    @staticmethod
    def cross_entropy(logits: Tensor, targets: Tensor) -> Tensor:
        """Return losses, and overwrite `logits` with its gradient."""
        log_probabilities = torch.log_softmax(logits.float(), dim=-1)
        chosen = targets[:, None]
        losses = -log_probabilities.gather(1, chosen).squeeze(1)
        gradient = log_probabilities.exp_()
        gradient.scatter_add_(1, chosen, torch.full_like(chosen, -1, dtype=gradient.dtype))
        logits.copy_(gradient)
        return losses


def _dequantize_one(weight: FourBitWeight, out: Tensor) -> None:
    constants = weight.absmax.float()
    if weight.nested_code is not None:
        assert weight.nested_absmax is not None
        assert weight.nested_offset is not None
        outer = weight.nested_absmax.repeat_interleave(weight.nested_block)[: constants.numel()]
        constants = weight.nested_code[weight.absmax.long()] * outer + weight.nested_offset
    nibbles = torch.stack((weight.packed >> 4, weight.packed & 15), dim=1).reshape(-1)
    values = weight.code[nibbles.long()]
    values = values * constants.repeat_interleave(weight.block)[: values.numel()]
    out.copy_(values.view(weight.out_features, weight.in_features))


def _inverse_rms(wide: Tensor, eps: float) -> Tensor:
    """Return 1 / sqrt(mean of squares + eps) over the last dimension, which is kept as 1."""
    return torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)


def _norm_gradient(d_out: Tensor, x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """Return (g - n mean(n g)) / rms(x), with n = x / rms(x) and g = weight x d_out."""
    inverse = _inverse_rms(x, eps)
    normed, scaled = x * inverse, weight * d_out
    return inverse * (scaled - normed * (normed * scaled).mean(-1, keepdim=True))
