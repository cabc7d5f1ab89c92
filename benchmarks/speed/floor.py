"""The least time a step can take on this GPU: its indispensable kernels, each timed alone.

They run at the model's shapes, on the sequences of one step: frozen linear layers, dequantisation
of the 4-bit weights, attention over sequences of varying length, the output head. Adapters, norms,
activations, the optimizer and launches are left out. The kernels are those of the libraries
(cuBLAS, bitsandbytes, torch's attention), so a single part can be beaten, the sum hardly.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

from benchmarks.speed.cases import SHAPES

HEAD_TOKENS = 1024
LONG_TOKENS = 2048
"""Length from which one call per sequence may be faster than one call for all."""

_KERNELS = [SDPBackend.CUDNN_ATTENTION, SDPBackend.FLASH_ATTENTION, SDPBackend.MATH]


def measure(shape: str, lengths: list[int]) -> dict[str, Any]:
    """Return the milliseconds of each part of one step, and the tokens/s that follow from them.

    Args:
        shape: Key of `SHAPES`.
        lengths: Number of tokens of each sequence of the step.
    """
    sizes = SHAPES[shape]
    tokens, layers = sum(lengths), sizes["num_hidden_layers"]
    forward = backward = dequantise = 0.0
    for out_features, in_features in _projections(sizes):
        times = _linear(out_features, in_features, tokens)
        forward += layers * times[0]
        backward += layers * times[1]
        dequantise += layers * times[2]
    attention, attention_by = _attention(sizes, lengths)
    attention_forward, attention_backward = (layers * part for part in attention)
    head = _head(sizes) * tokens / HEAD_TOKENS
    kept = forward + backward + 2 * dequantise + attention_forward + attention_backward + head
    recomputed = kept + forward + dequantise + attention_forward
    return {
        "tokens": tokens,
        "linear_forward_ms": forward,
        "linear_input_gradient_ms": backward,
        "dequantise_once_ms": dequantise,
        "attention_forward_ms": attention_forward,
        "attention_backward_ms": attention_backward,
        "attention_by": attention_by,
        "head_forward_and_gradient_ms": head,
        "nothing_recomputed_ms": kept,
        "all_recomputed_ms": recomputed,
        "nothing_recomputed_tokens_per_second": 1e3 * tokens / kept,
        "all_recomputed_tokens_per_second": 1e3 * tokens / recomputed,
    }


def _projections(sizes: dict[str, Any]) -> list[tuple[int, int]]:
    """Return (output, input) features of the seven projections of a layer."""
    hidden, wide = sizes["hidden_size"], sizes["intermediate_size"]
    query = sizes["num_attention_heads"] * sizes["head_dim"]
    key = sizes["num_key_value_heads"] * sizes["head_dim"]
    attention = [(query, hidden), (key, hidden), (key, hidden), (hidden, query)]
    return [*attention, (wide, hidden), (wide, hidden), (hidden, wide)]


def _linear(out_features: int, in_features: int, tokens: int) -> tuple[float, float, float]:
    """Time the forward pass, input gradient and dequantisation of one weight, in ms."""
    from bitsandbytes.functional import dequantize_4bit, quantize_4bit

    weight = _random(out_features, in_features)
    packed, state = quantize_4bit(weight, quant_type="nf4", compress_statistics=True)
    x, gradient = _random(tokens, in_features), _random(tokens, out_features)
    return (
        _milliseconds(lambda: x @ weight.t()),
        _milliseconds(lambda: gradient @ weight),
        _milliseconds(lambda: dequantize_4bit(packed, state)),
    )


def _attention(sizes: dict[str, Any], lengths: list[int]) -> tuple[tuple[float, float], str]:
    """Time attention of one layer; return (forward, backward) ms and the fastest way's name."""
    heads, dim = sizes["num_attention_heads"], sizes["head_dim"]
    tokens = sum(lengths)
    query: Any = _random(tokens, heads, dim).requires_grad_()
    key: Any = _random(tokens, heads, dim).requires_grad_()

    def each(q: Any) -> torch.Tensor:
        parts = zip(q.split(lengths), key.split(lengths), strict=True)
        attend: Any = torch.nn.functional.scaled_dot_product_attention
        done = [
            attend(*(t.transpose(0, 1)[None] for t in (a, b, b)), is_causal=True) for a, b in parts
        ]
        return torch.cat([part[0].transpose(0, 1) for part in done])

    ways: list[tuple[tuple[float, float], str]] = []
    try:
        ways.append((_timed_attention(query, _varlen(lengths, sizes)), "varlen_attn"))
    except (AttributeError, ImportError, RuntimeError, TypeError, ValueError) as error:
        reason = f"{type(error).__name__}: {str(error)[:200]}"
        print(f"no varlen attention, so one call per sequence: {reason}", flush=True)
    if not ways or min(lengths) >= LONG_TOKENS:
        with sdpa_kernel(_KERNELS, set_priority=True):
            ways.append((_timed_attention(query, each), "sdpa, one call per sequence"))
    return min(ways, key=lambda way: sum(way[0]))


def _varlen(lengths: list[int], sizes: dict[str, Any]) -> Callable[[torch.Tensor], torch.Tensor]:
    """Return torch's causal varlen attention; its arguments differ between versions."""
    from torch.nn.attention.varlen import varlen_attn

    heads, key_heads = sizes["num_attention_heads"], sizes["num_key_value_heads"]
    known = inspect.signature(varlen_attn).parameters
    more: dict[str, Any] = {"is_causal": True} if "is_causal" in known else {}
    if not more:
        more["window_size"] = (-1, 0)
    if "enable_gqa" in known:
        more["enable_gqa"] = True
    else:
        key_heads = heads  # it may refuse fewer; equal heads always work
    bounds = torch.tensor([0, *lengths], device="cuda").cumsum(0).to(torch.int32)
    key, value = (
        _random(sum(lengths), key_heads, sizes["head_dim"]).requires_grad_() for _ in range(2)
    )
    longest = max(lengths)

    def attend(query: torch.Tensor) -> torch.Tensor:
        result: Any = varlen_attn(query, key, value, bounds, bounds, longest, longest, **more)
        return result if isinstance(result, torch.Tensor) else result[0]

    return attend


def _timed_attention(
    query: torch.Tensor, attend: Callable[[torch.Tensor], torch.Tensor]
) -> tuple[float, float]:
    gradient = torch.randn_like(query)

    def both() -> None:
        torch.autograd.grad(attend(query), query, gradient)

    def forward() -> None:
        with torch.no_grad():
            attend(query)

    both()
    forward_ms = _milliseconds(forward)
    return forward_ms, max(0.0, _milliseconds(both) - forward_ms)


def _head(sizes: dict[str, Any]) -> float:
    """Time forward pass and input gradient of the output head for `HEAD_TOKENS` tokens, in ms."""
    weight = _random(sizes["vocab_size"], sizes["hidden_size"])
    hidden = _random(HEAD_TOKENS, sizes["hidden_size"])
    gradient = _random(HEAD_TOKENS, sizes["vocab_size"])
    return _milliseconds(lambda: hidden @ weight.t()) + _milliseconds(lambda: gradient @ weight)


def _random(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, device="cuda", dtype=torch.bfloat16)


def _milliseconds(run: Callable[[], Any], repeats: int = 8) -> float:
    """Return the mean time of `run` on the device, after a warm-up."""
    for _ in range(3):
        run()
    begin = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
    end = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
    torch.cuda.synchronize()
    begin.record()
    for _ in range(repeats):
        run()
    end.record()
    torch.cuda.synchronize()
    return float(begin.elapsed_time(end)) / repeats
