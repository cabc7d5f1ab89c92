"""The kernels of a decoding step against their plain twin."""

from __future__ import annotations

import pytest
import torch

from qwen3ft.decoding.attention import HeadNorms, PlainAttention, Slots
from qwen3ft.planning.decoder_sizes import PAGE_TOKENS
from qwen3ft.training.fused.reference import ReferenceOps

PAGES = 20


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float32, 1e-6), (torch.float16, 1e-3), (torch.bfloat16, 5e-3)]
)
@pytest.mark.parametrize(
    ("slots", "heads", "key_heads", "head_dim"),
    [(5, 8, 2, 16), (3, 5, 1, 64), (37, 32, 8, 128), (64, 40, 8, 128)],
)
def test_a_step_enters_and_attends_as_plain_torch(
    dtype: torch.dtype, tolerance: float, slots: int, heads: int, key_heads: int, head_dim: int
) -> None:
    """Answers of one token and of many, on scattered pages."""
    from qwen3ft.decoding.kernels import TritonAttention

    generator = torch.Generator().manual_seed(0)
    pages = (torch.randperm(slots * PAGES, generator=generator) + 1).view(slots, PAGES)
    positions = torch.randint(0, PAGES * PAGE_TOKENS, (slots,), generator=generator)
    positions[0] = 0
    angles = 6 * torch.rand(slots, head_dim // 2, generator=generator)
    where = Slots(*(t.cuda() for t in (positions.int(), pages.int(), angles.cos(), angles.sin())))

    def random(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator).to("cuda", dtype)

    keys, values = (
        random((slots * PAGES + 1) * PAGE_TOKENS, key_heads, head_dim) for _ in range(2)
    )
    qkv = random(slots, (heads + 2 * key_heads) * head_dim)
    norms = HeadNorms(random(head_dim), random(head_dim), 1e-6)
    results = []
    for attention in (PlainAttention(ReferenceOps()), TritonAttention()):
        cache = keys.clone(), values.clone()
        q = attention.enter(qkv, norms, where, *cache)
        out = torch.full((slots, heads * head_dim + 8), torch.nan, dtype=dtype, device="cuda")
        attention.attend(q, where, *cache, out[:, :-8])
        assert out[:, -8:].isnan().all()
        results.append((q, *cache, out[:, :-8]))
    for truth, ours in zip(*results, strict=True):
        error = (ours.float() - truth.float()).norm() / truth.float().norm()
        assert error <= tolerance
