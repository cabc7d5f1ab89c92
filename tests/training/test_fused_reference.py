"""The element-wise functions in plain torch, against other implementations and autograd."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from support.fused_cases import ADAPTERS, EPS, QUANTISED, grouped, rotation, wide

from qwen3ft.training.fused.reference import ReferenceOps


def double(*tensors: torch.Tensor) -> list[torch.Tensor]:
    """Return fp64 copies that require gradients."""
    return [tensor.double().detach().requires_grad_() for tensor in tensors]


def rms_norm_by(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """Return RMS norm, written again for autograd in fp64."""
    return torch.nn.functional.rms_norm(x, (x.shape[-1],), weight, EPS)


def rotate_by(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Return heads rotated by transformers."""
    from transformers.models.qwen3.modeling_qwen3 import apply_rotary_pos_emb

    cos, sin = (torch.cat((half, half), dim=-1) for half in (cos, sin))
    return apply_rotary_pos_emb(x, x, cos, sin)[0]


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


@QUANTISED
@ADAPTERS
@pytest.mark.parametrize(("rows", "columns"), [((9,), 576), ((4, 5), 72), ((3, 1, 2), 66)])
def test_weights_are_those_of_bitsandbytes(
    rows: Any, columns: int, form: Any, adapter: Any
) -> None:
    """Bit for bit, with adapters beside and below; nothing else is touched."""
    case = grouped(rows, columns, form, "cpu", adapter)
    ReferenceOps.dequantize(*case[:4])
    assert torch.equal(case.out, case.truth)


def test_norms_are_those_of_transformers() -> None:
    """The norm of transformers rounds once more, before the weight, so fp32 is compared."""
    from transformers.models.qwen3.modeling_qwen3 import Qwen3RMSNorm

    norm = Qwen3RMSNorm(80, EPS)
    norm.weight.data = torch.randn(80)
    x, out = wide(5, 80, dtype=torch.float32, device="cpu"), torch.empty(5, 80)
    ReferenceOps.rms_norm(x, norm.weight.data, EPS, out)
    torch.testing.assert_close(out, norm(x).detach())

    norm = Qwen3RMSNorm(32, EPS)
    heads, (cos, sin) = torch.randn(5, 3, 32), rotation(5, 32)
    truth = rotate_by(norm(heads).transpose(0, 1)[None], cos[None], sin[None])[0].transpose(0, 1)
    result = ReferenceOps.norm_rotate(heads, norm.weight.data, cos, sin, EPS)
    torch.testing.assert_close(result, truth.detach())


def test_the_gradients_of_the_norms_are_autograds() -> None:
    """Autograd in fp64 is the truth."""
    d_out, x, before = (torch.randn(5, 80) for _ in range(3))
    weight = torch.randn(80)
    [leaf] = double(x)
    rms_norm_by(leaf, weight.double()).backward(d_out.double())
    d_x = before.clone()
    ReferenceOps.rms_norm_backward(d_out, x, weight, EPS, d_x)
    torch.testing.assert_close(d_x, before + leaf.grad.float())

    d_out, heads, weight = torch.randn(5, 3, 32), torch.randn(5, 3, 32), torch.randn(32)
    cos, sin = rotation(5, 32)
    [leaf] = double(heads)
    normed = rms_norm_by(leaf, weight.double()).transpose(0, 1)[None]
    rotated = rotate_by(normed, cos[None].double(), sin[None].double())[0].transpose(0, 1)
    rotated.backward(d_out.double())
    ReferenceOps.norm_rotate_backward(d_out, heads, weight, cos, sin, EPS)
    torch.testing.assert_close(heads, leaf.grad.float())


def test_the_gradient_of_the_activation_is_autograds() -> None:
    """`d_out` becomes the activation."""
    gate_up, d_out, out = torch.randn(5, 144) * 4, torch.randn(5, 72), torch.empty(5, 72)
    [leaf] = double(gate_up)
    gate, up = leaf.chunk(2, dim=-1)
    truth = torch.nn.functional.silu(gate) * up
    truth.backward(d_out.double())
    ReferenceOps.silu_mul(gate_up, out)
    ReferenceOps.silu_mul_backward(d_out, gate_up)
    torch.testing.assert_close(out, truth.detach().float())
    torch.testing.assert_close(d_out, out)
    torch.testing.assert_close(gate_up, leaf.grad.float())


def test_the_loss_is_torchs() -> None:
    """The logits become their gradient."""
    logits, targets = torch.randn(7, 50) * 5, torch.randint(50, (7,))
    [leaf] = double(logits)
    truth = torch.nn.functional.cross_entropy(leaf, targets, reduction="none")
    truth.sum().backward()
    losses = ReferenceOps.cross_entropy(logits, targets)
    torch.testing.assert_close(losses, truth.detach().float())
    torch.testing.assert_close(logits, leaf.grad.float())
