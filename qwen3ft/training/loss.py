"""The loss of the plain path: transformers' forward, with logits chunk by chunk."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any

import torch
from torch.utils.checkpoint import checkpoint as recompute

from qwen3ft.data.collators import IGNORED_LABEL


def summed_loss(model: Any, batch: Mapping[str, torch.Tensor], chunk_tokens: int) -> torch.Tensor:
    """Sum the negative log-likelihood, in nats, over all labels that are not `IGNORED_LABEL`.

    Args:
        model: A `Qwen3ForCausalLM`, with or without adapters.
        batch: `input_ids` and `labels`, shape (rows, tokens), and either `attention_mask` (1 for
            real tokens, 0 for padding) or `position_ids` (0 at the start of each sequence of a
            packed row) of the same shape.
        chunk_tokens: Positions whose logits, (chunk, vocabulary), exist at a time; the backward
            recomputes them.

    Returns:
        fp32 scalar.
    """
    labels = batch["labels"]
    hidden = model.model(
        input_ids=batch["input_ids"],
        attention_mask=batch.get("attention_mask"),
        position_ids=batch.get("position_ids"),
        use_cache=False,
    ).last_hidden_state
    trained = labels[:, 1:] != IGNORED_LABEL
    hidden, targets = hidden[:, :-1][trained], labels[:, 1:][trained]
    total: torch.Tensor = hidden.new_zeros((), dtype=torch.float32)
    # The head is bound, not passed: recomputation saves arguments, and offloading would copy it.
    chunk_loss = partial(_chunk_loss, model.lm_head)
    for start in range(0, len(targets), chunk_tokens):
        chunk = slice(start, start + chunk_tokens)
        total = total + recompute(chunk_loss, hidden[chunk], targets[chunk], use_reentrant=False)
    return total


def _chunk_loss(head: torch.nn.Linear, hidden: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    logits = head_product(hidden, head.weight).float()
    loss: torch.Tensor = torch.nn.functional.cross_entropy(logits, targets, reduction="sum")
    return loss


def head_product(hidden: torch.Tensor, head: torch.Tensor) -> torch.Tensor:
    """Return the logits, (tokens, vocabulary), of `hidden`, (tokens, size), by the head."""
    # On a CPU the order of fp32 sums depends on the number of tokens and threads, and softmax
    # magnifies the error of large logits: gradients of micro-batches of one row differed by 2e-6
    # from those of the whole batch. With float64 sums they differ by less than 5e-7.
    if hidden.device.type == "cpu" and hidden.dtype == torch.float32:
        return torch.nn.functional.linear(hidden.double(), head.double()).float()
    return torch.nn.functional.linear(hidden, head)
