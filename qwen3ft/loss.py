"""The loss of the plain path: transformers' forward, its logits chunk by chunk."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any

import torch
from torch.utils.checkpoint import checkpoint as recompute

from qwen3ft.batches import IGNORED


def summed_loss(model: Any, batch: Mapping[str, torch.Tensor], chunk_tokens: int) -> torch.Tensor:
    """Negative log-likelihood in nats, summed over all positions whose label is not `IGNORED`.

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
    trained = labels[:, 1:] != IGNORED
    hidden, targets = hidden[:, :-1][trained], labels[:, 1:][trained]
    total: torch.Tensor = hidden.new_zeros((), dtype=torch.float32)
    # The head is bound, not passed: what is passed is saved, and offloading would copy it.
    chunk_loss = partial(_chunk_loss, model.lm_head)
    for start in range(0, len(targets), chunk_tokens):
        chunk = slice(start, start + chunk_tokens)
        total = total + recompute(chunk_loss, hidden[chunk], targets[chunk], use_reentrant=False)
    return total


def _chunk_loss(head: torch.nn.Module, hidden: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    loss: torch.Tensor = torch.nn.functional.cross_entropy(
        head(hidden).float(), targets, reduction="sum"
    )
    return loss
