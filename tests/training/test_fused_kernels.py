"""The kernels of a block's element-wise work, against their plain twin.

The kernels run on a GPU, or in Triton's interpreter on a CPU: in a process of its own, since Triton
decides that when it is imported.
"""

from __future__ import annotations

import gc
import importlib.util
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from support.fused_cases import (
    ADAPTERS,
    EPS,
    INTERPRETED,
    QUANTISED,
    QUANTISED_TYPE,
    grouped,
    neighbours,
    rotation,
    wide,
)

from qwen3ft.training.fused import launch
from qwen3ft.training.fused.reference import ReferenceOps

TYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
# (tokens, hidden, heads, head_dim, intermediate, rows, vocabulary)
SIZES = (
    [(5, 80, 3, 32, 72, 3, 17000), (1, 64, 1, 128, 2056, 1, 1001)]
    if INTERPRETED
    else [(1037, 2560, 32, 128, 9728, 37, 151_936), (131, 5120, 40, 128, 17408, 5, 4099)]
)
# Rows of each weight, and columns: with no whole number of tiles, of blocks, and of words.
GROUPS = [((33,), 576), ((7, 32, 1), 128), ((40, 3), 64), ((16, 5), 72), ((3,), 66)]
if not INTERPRETED:
    GROUPS += [((9728, 9728), 2560), ((4096, 1024, 1024), 2560), ((2560,), 9728), ((1024,), 17408)]


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


@pytest.mark.skipif(
    INTERPRETED or importlib.util.find_spec("triton") is None, reason="needs Triton"
)
def test_kernels_do_the_same_in_the_interpreter() -> None:
    """The tests below pass on a CPU."""
    finished = subprocess.run(
        [sys.executable, "-m", "pytest", "-n", "0", "-m", "gpu", __file__],
        env={**os.environ, "TRITON_INTERPRET": "1", "CUDA_VISIBLE_DEVICES": ""},
        cwd=Path(__file__).parents[2],
        capture_output=True,
        text=True,
        check=False,
    )
    assert finished.returncode == 0, finished.stdout[-4000:] + finished.stderr[-2000:]


@pytest.fixture
def device() -> str:
    """Return the device that kernels run on here."""
    if INTERPRETED:
        return "cpu"
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    return "cuda"


on_kernels = pytest.mark.parametrize("size", SIZES)
in_all_types = pytest.mark.parametrize("kind", TYPES)


def same(ours: torch.Tensor, theirs: torch.Tensor, atol: float = 5e-5) -> None:
    """Assert equality up to one rounding to the type and the order of fp32 sums."""
    if not theirs.is_floating_point():
        assert torch.equal(ours, theirs)
        return
    rtol = 1.01 * torch.finfo(theirs.dtype).eps if theirs.dtype != torch.float32 else 2e-5
    torch.testing.assert_close(ours, theirs, rtol=rtol, atol=atol)


def twins(name: str, *arguments: Any, atol: float = 5e-5) -> None:
    """Assert that kernel and reference return and overwrite the same, and nothing else."""
    kernels = _kernels()

    def run(function: Callable[..., Any], copies: list[Any]) -> list[torch.Tensor]:
        result = function(*copies)
        return [*([result] if result is not None else []), *filter(torch.is_tensor, copies)]

    def copy(value: Any) -> Any:
        if not torch.is_tensor(value) or value.is_contiguous():
            return value.clone() if torch.is_tensor(value) else value
        whole = value.as_strided((value.untyped_storage().nbytes() // value.itemsize,), (1,), 0)
        return whole.clone().as_strided(value.shape, value.stride(), value.storage_offset())

    ours = run(getattr(kernels, name), mine := [copy(value) for value in arguments])
    theirs = run(getattr(ReferenceOps, name), [copy(value) for value in arguments])
    for mine_after, truth in zip(ours, theirs, strict=True):
        same(mine_after, truth, atol)
    for value in mine:
        if torch.is_tensor(value) and value.ndim == 2 and not value.is_contiguous():
            assert (neighbours(value) == 7).all()


@pytest.mark.gpu
@QUANTISED
@ADAPTERS
@pytest.mark.parametrize(("rows", "columns"), GROUPS)
def test_the_kernel_dequantises_as_bitsandbytes_does(
    device: str, rows: Any, columns: int, form: Any, adapter: Any
) -> None:
    """Bit for bit, with adapters beside and below, and no more; also at a second launch."""
    case = grouped(rows, columns, form, device, adapter)
    for _ in range(2):  # how the kernel is found differs
        case.out.fill_(7)
        _kernels().dequantize(*case[:4])
        assert torch.equal(case.out, case.truth)


@pytest.mark.gpu
@pytest.mark.parametrize("shift", [1, 8])
def test_what_is_known_of_a_group_does_not_outlive_it(device: str, shift: int) -> None:
    """And the address of an output is not cached."""
    kernels = _kernels()
    for _ in range(3):
        case = grouped((5, 40), 64, ("nf4", True), device)
        full = torch.full((case.out.numel() + shift,), 7.0, dtype=QUANTISED_TYPE, device=device)
        for start in (0, shift):
            out = full[start : start + case.out.numel()].view_as(case.out).fill_(7)
            kernels.dequantize(case.weights, out)
            assert torch.equal(out, case.truth)
        del case
    gc.collect()
    from qwen3ft.training.fused.kernels import _groups

    assert not _groups


@pytest.mark.gpu
@pytest.mark.skipif(INTERPRETED, reason="nothing is compiled")
def test_rows_of_another_length_compile_nothing(device: str) -> None:
    """Whatever divides the length."""
    kernels = _kernels()

    def step(tokens: int) -> None:
        how: Any = {"dtype": torch.bfloat16, "device": device}
        x, weight, head = (torch.randn(*n, **how) for n in ((tokens, 256), (256,), (128,)))
        out, heads, (cos, sin) = x + 1, x.view(tokens, 2, 128), rotation(tokens, 128, device)
        kernels.rms_norm(x, weight, EPS, out)
        kernels.rms_norm_backward(x, x, weight, EPS, out)
        turned = kernels.norm_rotate(heads, head, cos, sin, EPS)
        by_head = turned.transpose(0, 1).contiguous().transpose(0, 1)
        kernels.norm_rotate_backward(by_head, heads, head, cos, sin, EPS)
        kernels.silu_mul(x, out[:, :128])
        kernels.silu_mul_backward(out[:, :128], x)
        kernels.cross_entropy(x, torch.zeros(tokens, dtype=torch.int64, device=device))

    step(32)
    before = set(launch._compiled)
    for tokens in (1, 2, 7, 16, 48, 1000):
        step(tokens)
    assert set(launch._compiled) == before


@pytest.mark.gpu
@on_kernels
@in_all_types
def test_the_kernels_of_norms_do_the_same(device: str, size: tuple[int, ...], kind: str) -> None:
    """Strided rows are supported."""
    tokens, hidden, *_ = size
    how: Any = {"dtype": TYPES[kind], "device": device}
    weight = torch.randn(hidden, **how)
    x, d_out, d_x = (wide(tokens, hidden, behind=behind, **how) for behind in (0, 24, 5))
    twins("rms_norm", x, weight, EPS, d_out)
    twins("rms_norm", d_out, weight, EPS, d_x)
    twins("rms_norm_backward", d_out, x, weight, EPS, d_x)


@pytest.mark.gpu
@on_kernels
@in_all_types
def test_the_kernels_of_heads_do_the_same(device: str, size: tuple[int, ...], kind: str) -> None:
    """Heads may lie between others, as in the product of q, k and v."""
    tokens, _, count, head_dim, *_ = size
    how: Any = {"dtype": TYPES[kind], "device": device}
    width = count * head_dim
    heads, d_out = (
        torch.randn(tokens, before + width + 16, **how)[:, before : before + width].unflatten(
            1, (count, head_dim)
        )
        for before in (head_dim, 0)
    )
    weight, (cos, sin) = torch.randn(head_dim, **how), rotation(tokens, head_dim, device)
    twins("norm_rotate", heads, weight, cos, sin, EPS)
    twins("norm_rotate_backward", d_out, heads, weight, cos, sin, EPS)
    table = torch.cat((cos, sin), dim=-1)
    cos, sin = table.chunk(2, dim=-1)
    twins("norm_rotate_backward", d_out.contiguous(), heads, weight, cos + 0, sin + 0, EPS)
    ours = _kernels().norm_rotate(heads, weight, cos, sin, EPS)
    same(ours, ReferenceOps.norm_rotate(heads, weight, cos, sin, EPS))


@pytest.mark.gpu
@on_kernels
@in_all_types
def test_the_kernels_of_the_activation_do_the_same(
    device: str, size: tuple[int, ...], kind: str
) -> None:
    """Also where the sigmoid's exponential overflows."""
    tokens, *_, width, _, _ = size
    how: Any = {"dtype": TYPES[kind], "device": device}
    gate_up = torch.randn(tokens, 2 * width, **how) * 3
    gate_up[0, :3] = torch.tensor([-200.0, 200.0, 0.0])
    d_out = wide(tokens, width, **how)
    twins("silu_mul", gate_up, d_out)
    twins("silu_mul_backward", d_out, gate_up)


@pytest.mark.gpu
@on_kernels
@in_all_types
def test_the_kernel_of_the_loss_does_the_same(
    device: str, size: tuple[int, ...], kind: str
) -> None:
    """Targets at both ends, and logits that overflow an exponential."""
    *_, rows, vocabulary = size
    logits = (torch.randn(rows, vocabulary, device=device) * 4).to(TYPES[kind])
    targets = torch.randint(vocabulary, (rows,), device=device)
    targets[0], targets[-1] = 0, vocabulary - 1
    logits[0] += 1000
    twins("cross_entropy", logits, targets, atol=1e-7)


@pytest.mark.gpu
@pytest.mark.skipif(INTERPRETED, reason="needs 7 GB")
def test_offsets_beyond_31_bits(device: str) -> None:
    """Offsets above 2**31 are right."""
    size, stride = 2560, 2**30 + 8
    full = torch.empty(2 * stride + 2 * size, dtype=torch.bfloat16, device=device)
    x = full.as_strided((3, size), (stride, 1)).normal_()
    out, truth = (torch.empty(3, size, dtype=torch.bfloat16, device=device) for _ in range(2))
    weight = torch.randn(size, dtype=torch.bfloat16, device=device)
    _kernels().rms_norm(x, weight, EPS, out)
    ReferenceOps.rms_norm(x, weight, EPS, truth)
    same(out, truth)
    gate_up = full.as_strided((3, 2 * size), (stride, 1)).normal_()
    _kernels().silu_mul(gate_up, out)
    ReferenceOps.silu_mul(gate_up, truth)
    same(out, truth)


def _kernels() -> Any:
    from qwen3ft.training.fused.kernels import TritonOps

    return TritonOps
