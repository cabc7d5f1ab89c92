"""Causal attention within each sequence of a packed row, and its gradient.

On a GPU these are torch's own kernels: FlashAttention for sequences of varying length (Dao 2023,
arXiv:2307.08691), the ones `torch.nn.attention.varlen` calls, and cuDNN's for a long sequence that
has its row for itself, which are much faster on Hopper. Calling them directly gives the backward
what the step chose to keep. Elsewhere the same is written out, sequence by sequence.
"""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass

import torch

LONG_TOKENS = 16384
"""A sequence of at least this length is worth a call of cuDNN's kernels: they take one at a time
and are prepared anew for each length, which takes about 0.1 s and is won back in one step from here
on (`benchmarks/README.md`)."""


@dataclass(frozen=True)
class Segments:
    """Where the sequences of a packed row lie.

    Attributes:
        bounds: int32, (sequences + 1,), on the device: where each begins, and the row's end.
        longest: Tokens of the longest.
        host_bounds: `bounds` as plain numbers.
    """

    bounds: torch.Tensor
    longest: int
    host_bounds: tuple[int, ...]

    def slices(self) -> list[slice]:
        """The tokens of each sequence."""
        return [slice(start, end) for start, end in itertools.pairwise(self.host_bounds)]

    def has_long(self) -> bool:
        """Whether sequences are to be attended to one by one: most tokens are of long ones."""
        of_long = sum(
            end - start
            for start, end in itertools.pairwise(self.host_bounds)
            if end - start >= LONG_TOKENS
        )
        return 2 * of_long > self.host_bounds[-1]

    def part(self, rows: slice) -> Segments:
        """One of the sequences by itself."""
        tokens = rows.stop - rows.start
        # Made on the device: to copy it there would wait for all that is queued.
        bounds = torch.arange(2, dtype=torch.int32, device=self.bounds.device) * tokens
        return Segments(bounds, tokens, (0, tokens))


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
    if segments.has_long() and _has_cudnn(q):
        if len(slices := segments.slices()) == 1:
            return _cudnn(q, k, v)
        parts = [attend(q[rows], k[rows], v[rows], segments.part(rows)) for rows in slices]
        outs, log_sum_exps = zip(*parts, strict=True)
        return torch.cat(outs), torch.cat(log_sum_exps, dim=1)
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
        q: As it was given.
        k: As it was given.
        v: As it was given.
        out: What `attend` returned.
        log_sum_exp: The same.
        segments: The sequences.
    """
    if not q.is_cuda:
        return _attend_backward_plainly(d_out, q, k, v, out, log_sum_exp, segments)
    if segments.has_long() and _has_cudnn(q):
        if len(slices := segments.slices()) == 1:
            return _cudnn_backward(d_out, q, k, v, out, log_sum_exp)
        parts = [
            attend_backward(
                d_out[rows],
                q[rows],
                k[rows],
                v[rows],
                out[rows],
                log_sum_exp[:, rows].contiguous(),
                segments.part(rows),
            )
            for rows in slices
        ]
        d_q, d_k, d_v = (torch.cat(gradients) for gradients in zip(*parts, strict=True))
        return d_q, d_k, d_v
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


def _has_cudnn(q: torch.Tensor) -> bool:
    """Whether cuDNN's kernels for Hopper and newer cards are there."""
    available: bool = torch.backends.cudnn.is_available()  # type: ignore[no-untyped-call]
    return available and torch.cuda.get_device_capability(q.device) >= (9, 0)


def _cudnn(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """`attend` for one sequence."""
    out, log_sum_exp, *_ = torch.ops.aten._scaled_dot_product_cudnn_attention(
        _heads_first(q), _heads_first(k), _heads_first(v), None, True, 0.0, True, False
    )
    return out[0].transpose(0, 1).contiguous(), log_sum_exp.view(q.shape[1], len(q))


def _cudnn_backward(
    d_out: torch.Tensor,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    out: torch.Tensor,
    log_sum_exp: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """`attend_backward` for one sequence."""
    unused = torch.zeros((), dtype=torch.int64, device=q.device)  # the state of dropout
    gradients = torch.ops.aten._scaled_dot_product_cudnn_attention_backward(
        *(_heads_first(t) for t in (d_out, q, k, v, out)),
        log_sum_exp[None, :, :, None],
        unused,
        unused,
        None,
        None,
        None,
        len(q),
        len(k),
        0.0,
        True,
    )
    d_q, d_k, d_v = (gradient[0].transpose(0, 1) for gradient in gradients)
    return d_q, d_k, d_v


def _heads_first(heads: torch.Tensor) -> torch.Tensor:
    """(tokens, heads, d) as a view of (1, heads, tokens, d)."""
    return heads.transpose(0, 1)[None]


def _attend_plainly(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, segments: Segments
) -> tuple[torch.Tensor, torch.Tensor]:
    out = torch.empty_like(q)
    log_sum_exp = torch.empty(q.shape[1], len(q), dtype=torch.float32, device=q.device)
    for rows in segments.slices():
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
    for rows in segments.slices():
        wide = d_out[rows].float().transpose(0, 1)
        weights = torch.exp(_scores(q[rows], k[rows]) - log_sum_exp[:, rows, None])
        d_weights = wide @ _per_query_head(v[rows], q).transpose(1, 2)
        delta = (wide * out[rows].float().transpose(0, 1)).sum(-1, keepdim=True)
        d_scores = weights * (d_weights - delta) * scale
        d_q[rows] = (d_scores @ _per_query_head(k[rows], q)).transpose(0, 1)
        d_k[rows] = _per_key_head(d_scores.transpose(1, 2) @ q[rows].float().transpose(0, 1), k)
        d_v[rows] = _per_key_head(weights.transpose(1, 2) @ wide, v)
    return d_q, d_k, d_v


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
    grouped = gradient.view(count, len(gradient) // count, *gradient.shape[1:])
    return grouped.sum(1).transpose(0, 1)
