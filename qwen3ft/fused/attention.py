"""Causal attention within each sequence of a packed row, and its gradient.

On a GPU these are torch's own FlashAttention kernels for sequences of varying length (Dao 2023,
arXiv:2307.08691), the ones `torch.nn.attention.varlen` calls; calling them directly gives the
backward what the step chose to keep. Elsewhere the same is written out, sequence by sequence.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Segments:
    """Where the sequences of a packed row lie.

    Attributes:
        bounds: int32, (sequences + 1,), on the device: where each begins, and the row's end.
        longest: Tokens of the longest.
    """

    bounds: torch.Tensor
    longest: int


def attend(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, segments: Segments
) -> tuple[torch.Tensor, torch.Tensor]:
    """Causal softmax(q k / sqrt(head_dim)) v in each sequence.

    Args:
        q: (T, query heads, head_dim).
        k: (T, key-value heads, head_dim); each serves as many query heads, one after the other.
        v: The same.
        segments: The sequences.

    Returns:
        The output, like q, dense; and the log-sum-exp of each query's scores, (query heads, T).
    """
    if not q.is_cuda:
        return _attend_plainly(q, k, v, segments)
    out, log_sum_exp, *_ = torch.ops.aten._flash_attention_forward(
        q,
        k,
        v,
        segments.bounds,
        segments.bounds,
        segments.longest,
        segments.longest,
        0.0,
        True,
        False,
    )
    return out, log_sum_exp


def attend_backward(
    d_out: torch.Tensor,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    out: torch.Tensor,
    log_sum_exp: torch.Tensor,
    segments: Segments,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Gradients of `attend` with respect to q, k and v.

    Args:
        d_out: Of the output, like it.
        q, k, v: As they were given.
        out, log_sum_exp: What `attend` returned.
        segments: The sequences.
    """
    if not q.is_cuda:
        return _attend_backward_plainly(d_out, q, k, v, out, log_sum_exp, segments)
    unused = torch.empty(0, dtype=torch.uint64, device=q.device)  # the state of dropout
    d_q, d_k, d_v = torch.ops.aten._flash_attention_backward(
        d_out,
        q,
        k,
        v,
        out,
        log_sum_exp,
        segments.bounds,
        segments.bounds,
        segments.longest,
        segments.longest,
        0.0,
        True,
        unused,
        unused,
    )
    return d_q, d_k, d_v


def _attend_plainly(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, segments: Segments
) -> tuple[torch.Tensor, torch.Tensor]:
    out = torch.empty_like(q)
    log_sum_exp = torch.empty(q.shape[1], len(q), dtype=torch.float32, device=q.device)
    for rows in _rows(segments):
        scores = _scores(q[rows], k[rows])
        log_sum_exp[:, rows] = scores.logsumexp(-1)
        out[rows] = (scores.softmax(-1) @ _per_query_head(v[rows], q)).transpose(0, 1)
    return out, log_sum_exp


def _attend_backward_plainly(
    d_out: torch.Tensor,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    out: torch.Tensor,
    log_sum_exp: torch.Tensor,
    segments: Segments,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    d_q, d_k, d_v = (torch.empty_like(t, memory_format=torch.contiguous_format) for t in (q, k, v))
    scale = 1 / math.sqrt(q.shape[-1])
    for rows in _rows(segments):
        wide = d_out[rows].float().transpose(0, 1)
        weights = torch.exp(_scores(q[rows], k[rows]) - log_sum_exp[:, rows, None])
        d_weights = wide @ _per_query_head(v[rows], q).transpose(1, 2)
        delta = (wide * out[rows].float().transpose(0, 1)).sum(-1, keepdim=True)
        d_scores = weights * (d_weights - delta) * scale
        d_q[rows] = (d_scores @ _per_query_head(k[rows], q)).transpose(0, 1)
        d_k[rows] = _per_key_head(d_scores.transpose(1, 2) @ q[rows].float().transpose(0, 1), k)
        d_v[rows] = _per_key_head(weights.transpose(1, 2) @ wide, v)
    return d_q, d_k, d_v


def _rows(segments: Segments) -> list[slice]:
    bounds = segments.bounds.tolist()
    return [slice(start, end) for start, end in zip(bounds, bounds[1:], strict=False)]


def _scores(q: torch.Tensor, k: torch.Tensor) -> torch.Tensor:
    """Masked scores of one sequence in fp32, (query heads, tokens, tokens)."""
    keys = _per_query_head(k, q).transpose(1, 2)
    scores = q.float().transpose(0, 1) @ keys / math.sqrt(q.shape[-1])
    later = torch.ones(scores.shape[-2:], dtype=torch.bool, device=q.device).triu(1)
    return scores.masked_fill(later, -math.inf)


def _per_query_head(heads: torch.Tensor, q: torch.Tensor) -> torch.Tensor:
    """(tokens, key-value heads, d) in fp32 as (query heads, tokens, d)."""
    repeated = heads.float().repeat_interleave(q.shape[1] // heads.shape[1], dim=1)
    return repeated.transpose(0, 1)


def _per_key_head(gradient: torch.Tensor, heads: torch.Tensor) -> torch.Tensor:
    """(query heads, tokens, d) summed into (tokens, key-value heads, d)."""
    count = heads.shape[1]
    grouped = gradient.unflatten(0, (count, len(gradient) // count)).sum(1)
    return grouped.transpose(0, 1)
