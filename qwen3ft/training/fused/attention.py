"""Causal attention within each sequence of a packed row, and its gradient.

On a GPU these are torch's kernels, called directly so that the step chooses what to keep:
FlashAttention for sequences of varying length (Dao 2023, arXiv:2307.08691), as in
`torch.nn.attention.varlen`, and cuDNN's, which are much faster on Hopper, for long sequences. On a
CPU they are written out, sequence by sequence.
"""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass

import torch
from torch import Tensor

LONG_TOKENS = 16384
"""Shortest sequence for cuDNN's kernels. They take one sequence at a time and are prepared for each
length in about 0.1 s, which one step wins back from this length on (`benchmarks/README.md`)."""


@dataclass(frozen=True)
class Segments:
    """The sequences of a packed row.

    Attributes:
        bounds: int32, (sequences + 1,), on the device: start of each, and the end of the row.
        longest: Tokens of the longest sequence.
        host_bounds: `bounds` as plain numbers.
    """

    bounds: Tensor
    longest: int
    host_bounds: tuple[int, ...]

    def slices(self) -> list[slice]:
        """Return the tokens of each sequence."""
        return [slice(start, end) for start, end in itertools.pairwise(self.host_bounds)]

    def has_long(self) -> bool:
        """Return True if most tokens are of long sequences, which are then computed one by one."""
        of_long = sum(
            end - start
            for start, end in itertools.pairwise(self.host_bounds)
            if end - start >= LONG_TOKENS
        )
        return 2 * of_long > self.host_bounds[-1]

    def part(self, rows: slice) -> Segments:
        """Return one of the sequences as a row of its own."""
        tokens = rows.stop - rows.start
        # Made on the device: copying it there would wait for all queued work.
        bounds = torch.arange(2, dtype=torch.int32, device=self.bounds.device) * tokens
        return Segments(bounds, tokens, (0, tokens))


def attend(q: Tensor, k: Tensor, v: Tensor, segments: Segments) -> tuple[Tensor, Tensor]:
    """Compute causal softmax(q k / sqrt(head_dim)) v in each sequence.

    Args:
        q: (T, query heads, head_dim).
        k: (T, key-value heads, head_dim); each serves a group of neighbouring query heads.
        v: (T, key-value heads, head_dim).
        segments: The sequences.

    Returns:
        The output, dense and of q's shape, and the log-sum-exp of each query's scores,
        (query heads, T).
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
    d_out: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    log_sum_exp: Tensor,
    segments: Segments,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the gradients of `attend` with respect to q, k and v.

    `d_out` is the gradient of the output, (T, query heads, head_dim); the others are the arguments
    and outputs of `attend`.
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


def _has_cudnn(q: Tensor) -> bool:
    """Return True if cuDNN's kernels for Hopper and newer GPUs are available."""
    available: bool = torch.backends.cudnn.is_available()  # type: ignore[no-untyped-call]
    return available and torch.cuda.get_device_capability(q.device) >= (9, 0)


def _cudnn(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """Compute `attend` for one sequence."""
    # No bias; with log-sum-exp; no dropout; causal; no debug mask.
    out, log_sum_exp, *_ = torch.ops.aten._scaled_dot_product_cudnn_attention(
        _heads_first(q), _heads_first(k), _heads_first(v), None, True, 0.0, True, False
    )
    return out[0].transpose(0, 1).contiguous(), log_sum_exp.view(q.shape[1], len(q))


def _cudnn_backward(
    d_out: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, log_sum_exp: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Compute `attend_backward` for one sequence."""
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


def _heads_first(heads: Tensor) -> Tensor:
    """Return (tokens, heads, d) as a view of (1, heads, tokens, d)."""
    return heads.transpose(0, 1)[None]


def _attend_plainly(q: Tensor, k: Tensor, v: Tensor, segments: Segments) -> tuple[Tensor, Tensor]:
    out = torch.empty_like(q)
    log_sum_exp = torch.empty(q.shape[1], len(q), dtype=torch.float32, device=q.device)
    for rows in segments.slices():
        scores = _scores(q[rows], k[rows])
        log_sum_exp[:, rows] = scores.logsumexp(-1)
        out[rows] = (scores.softmax(-1) @ _per_query_head(v[rows], q)).transpose(0, 1)
    return out, log_sum_exp


def _attend_backward_plainly(
    d_out: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    log_sum_exp: Tensor,
    segments: Segments,
) -> tuple[Tensor, Tensor, Tensor]:
    d_q, d_k, d_v = (torch.empty_like(t, memory_format=torch.contiguous_format) for t in (q, k, v))
    scale = 1 / math.sqrt(q.shape[-1])
    for rows in segments.slices():
        wide = d_out[rows].float().transpose(0, 1)
        weights = torch.exp(_scores(q[rows], k[rows]) - log_sum_exp[:, rows, None])
        d_weights = wide @ _per_query_head(v[rows], q).transpose(1, 2)
        # Row sums of d_out x out are those of d_weights x weights (Dao 2023, algorithm 2).
        delta = (wide * out[rows].float().transpose(0, 1)).sum(-1, keepdim=True)
        d_scores = weights * (d_weights - delta) * scale
        d_q[rows] = (d_scores @ _per_query_head(k[rows], q)).transpose(0, 1)
        d_k[rows] = _per_key_head(d_scores.transpose(1, 2) @ q[rows].float().transpose(0, 1), k)
        d_v[rows] = _per_key_head(weights.transpose(1, 2) @ wide, v)
    return d_q, d_k, d_v


def _scores(q: Tensor, k: Tensor) -> Tensor:
    """Return the masked scores of one sequence in fp32, (query heads, tokens, tokens)."""
    keys = _per_query_head(k, q).transpose(1, 2)
    scores = q.float().transpose(0, 1) @ keys / math.sqrt(q.shape[-1])
    later = torch.ones(scores.shape[-2:], dtype=torch.bool, device=q.device).triu(1)
    return scores.masked_fill(later, -math.inf)


def _per_query_head(heads: Tensor, q: Tensor) -> Tensor:
    """Repeat (tokens, key-value heads, d) to fp32 (query heads, tokens, d)."""
    repeated = heads.float().repeat_interleave(q.shape[1] // heads.shape[1], dim=1)
    return repeated.transpose(0, 1)


def _per_key_head(gradient: Tensor, heads: Tensor) -> Tensor:
    """Sum (query heads, tokens, d) to (tokens, key-value heads, d)."""
    count = heads.shape[1]
    grouped = gradient.view(count, len(gradient) // count, *gradient.shape[1:])
    return grouped.sum(1).transpose(0, 1)
