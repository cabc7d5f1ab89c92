"""Attention within the sequences of a packed row, and offloading to host memory."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch

from qwen3ft.training.fused import attention
from qwen3ft.training.fused.attention import Segments, attend, attend_backward
from qwen3ft.training.fused.offload import HostStash


def segments_of(*lengths: int, device: str = "cpu") -> Segments:
    bounds = (0, *itertools.accumulate(lengths))
    return Segments(
        torch.tensor(bounds, dtype=torch.int32, device=device), max(lengths), tuple(bounds)
    )


def random_heads(tokens: int, *counts: int, size: int, **how: Any) -> list[torch.Tensor]:
    """Return a tensor of (tokens, heads, size) for each count, from a fixed seed."""
    torch.manual_seed(0)
    return [torch.randn(tokens, heads, size).to(**how) for heads in counts]


def attended_by_torch(
    d_out: torch.Tensor, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, segments: Segments
) -> list[torch.Tensor]:
    """Return output and gradients of q, k, v by SDPA and autograd in fp64, by sequence."""
    leaves = [tensor.detach().cpu().double().requires_grad_() for tensor in (q, k, v)]
    outs = []
    for rows in segments.slices():
        one = (leaf[rows].transpose(0, 1)[None] for leaf in leaves)
        out = torch.nn.functional.scaled_dot_product_attention(
            *one, is_causal=True, enable_gqa=True
        )
        outs.append(out[0].transpose(0, 1))
    whole = torch.cat(outs)
    whole.backward(d_out.cpu().double())
    return [whole.detach(), *(leaf.grad for leaf in leaves)]


@pytest.mark.parametrize(("queries", "keys"), [(4, 4), (8, 2), (6, 1)])
def test_attention_is_torchs_for_each_sequence(queries: int, keys: int) -> None:
    """Output and gradients, with several queries a key, and sequences down to one token."""
    segments = segments_of(9, 1, 30, 24)
    q, k, v, d_out = random_heads(64, queries, keys, keys, queries, size=16)
    out, log_sum_exp = attend(q, k, v, segments)
    result = [out, *attend_backward(d_out, q, k, v, out, log_sum_exp, segments)]
    for ours, truth in zip(result, attended_by_torch(d_out, q, k, v, segments), strict=True):
        torch.testing.assert_close(ours, truth.float(), rtol=1e-4, atol=1e-5)
    assert log_sum_exp.shape == (queries, 64)
    first = (q[:, 0] * k[:, 0]).sum(-1) / 4  # a sequence's first query has one score
    starts = list(segments.host_bounds[:-1])
    torch.testing.assert_close(log_sum_exp[0, starts], first[starts])


def test_heads_may_lie_apart() -> None:
    """Views into the product of q, k and v, as a block passes them: nothing else is read."""
    segments = segments_of(9, 23)
    [both, d_out] = random_heads(32, 8, 4, size=16)
    q, k, v = both[:, :4], both[:, 4:6], both[:, 6:]
    out, exps = attend(q, k, v, segments)
    result = [out, *attend_backward(d_out, q, k, v, out, exps, segments)]
    for ours, truth in zip(result, attended_by_torch(d_out, q, k, v, segments), strict=True):
        torch.testing.assert_close(ours, truth.float(), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("lengths", "long"),
    [
        ((99,), False),
        ((100,), True),
        ((100, 99), True),
        ((100, 100), True),
        ((100, 50, 50), False),  # half of the tokens is not most
        ((100, 50, 49), True),
        ((99, 99, 99), False),
        ((300, 90, 90, 90), True),
    ],
)
def test_sequences_are_attended_to_one_by_one_if_most_tokens_are_in_long_ones(
    monkeypatch: pytest.MonkeyPatch, lengths: tuple[int, ...], long: bool
) -> None:
    """A row counts as long if most of its tokens are in long sequences."""
    monkeypatch.setattr(attention, "LONG_TOKENS", 100)
    assert segments_of(*lengths).has_long() == long


def test_a_part_is_one_sequence() -> None:
    """Its bounds are those of a row of its own."""
    segments = segments_of(9, 1, 30)
    parts = [segments.part(rows) for rows in segments.slices()]
    assert [part.host_bounds for part in parts] == [(0, 9), (0, 1), (0, 30)]
    assert [part.bounds.tolist() for part in parts] == [[0, 9], [0, 1], [0, 30]]
    assert [part.longest for part in parts] == [9, 1, 30]
    assert all(part.bounds.dtype == torch.int32 for part in parts)


@pytest.mark.gpu
@pytest.mark.parametrize("lengths", [(513,), (300, 212), (3, 500, 9)])
@pytest.mark.parametrize("long_tokens", [10**9, 64])
def test_attention_on_a_gpu_is_torchs(
    monkeypatch: pytest.MonkeyPatch, lengths: tuple[int, ...], long_tokens: int
) -> None:
    """FlashAttention, and cuDNN's kernels where sequences count as long, up to bf16's rounding."""
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    monkeypatch.setattr(attention, "LONG_TOKENS", long_tokens)
    segments, how = (
        segments_of(*lengths, device="cuda"),
        {"device": "cuda", "dtype": torch.bfloat16},
    )
    both, d_out = random_heads(sum(lengths), 16, 8, size=128, **how)
    q, k, v = both[:, :8].contiguous(), both[:, 8:12].contiguous(), both[:, 12:]
    out, exps = attend(q, k, v, segments)
    result = [out, *attend_backward(d_out, q, k, v, out, exps, segments)]
    for ours, truth in zip(result, attended_by_torch(d_out, q, k, v, segments), strict=True):
        assert float((ours.cpu().double() - truth).norm() / truth.norm()) <= 2e-2


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def device(request: pytest.FixtureRequest) -> torch.device:
    """Return the device of the offloaded tensors."""
    if request.param == "cuda" and not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    return torch.device(request.param)


def test_what_waits_in_host_memory_comes_back_bit_for_bit(device: torch.device) -> None:
    """Tensors of any type return unchanged, prefetched or not, in one slab or several."""
    stash = HostStash(device, slab_bytes=1024)
    torch.manual_seed(0)
    originals = [
        torch.randn(7, 33, device=device),  # less than a slab
        torch.randn(2, 3, 5, dtype=torch.bfloat16, device=device),
        torch.randint(9, (2, 8, 16), device=device),  # two slabs, to the last byte
        torch.randn(4, 64, device=device),  # one
        torch.tensor(1.5, device=device),
    ]
    stashed = [each for half in (originals[:3], originals[3:]) for each in stash.put(half)]
    assert stash.pinned_bytes == 5 * 1024  # 1024, 512, 2048, 1024 and 512, as they are aligned
    stash.fetch(stashed[2])
    for original, each in zip(originals, stashed, strict=True):
        back = stash.take(each)
        assert back.dtype == original.dtype
        assert back.device == original.device
        assert torch.equal(back, original)


def test_host_memory_is_used_again_and_never_by_two(device: torch.device) -> None:
    """A second step takes no more pinned memory than the first; waiting tensors stay intact."""
    stash = HostStash(device, slab_bytes=1024)
    for step in range(3):
        originals = [torch.full((600,), 10.0 * step + i, device=device) for i in range(4)]
        stashed = stash.put([tensor.clone() for tensor in originals])
        first = stash.take(stashed.pop(0))
        (again,) = stash.put([torch.full((600,), -1.0, device=device)])
        assert torch.equal(first, originals[0])
        for original, each in zip(originals[1:], stashed, strict=True):
            assert torch.equal(stash.take(each), original)
        assert bool((stash.take(again) == -1).all())
        assert stash.pinned_bytes == 13 * 1024  # five of 2,400 bytes, each aligned to 512
