"""The loss of the plain path: transformers' forward, its logits chunk by chunk."""

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
        model: A `Qwen3ForCausalLM`, adapters injected or not.
        batch: `input_ids` and `labels` (targets aligned with them), shape (rows, tokens), and
            either `attention_mask` (1 for real tokens, 0 for padding) or `position_ids` (0 where a
            sequence of a packed row begins) of the same shape.
        chunk_tokens: Positions whose logits (chunk, vocabulary) exist at one time; backward
            computes them again instead of keeping them.

    Returns:
        A scalar in fp32.
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
    # The head is bound, not passed: what is passed is saved, and offloading would copy it.
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
    """Logits, (tokens, vocabulary), of the states `hidden`, (tokens, size), by the head's weight.

    In fp32 on a CPU the sums are float64's. The order of fp32's depends there on the number of
    tokens and of threads, and softmax magnifies what logits of 20 are off by: with micro-batches of
    one row, gradients were 2e-6 from those of the whole batch; so they are within 5e-7.
    """
    if hidden.device.type == "cpu" and hidden.dtype == torch.float32:
        return torch.nn.functional.linear(hidden.double(), head.double()).float()
    return torch.nn.functional.linear(hidden, head)
