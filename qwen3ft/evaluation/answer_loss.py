"""Loss of reference answers, row by row, rendered as for training.

Running out of GPU memory halves the batch, as in `qwen3ft.evaluation.generation`. Results are not
bit-identical between batch sizes: padding changes the order of floating-point sums.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from qwen3ft.chat.rendering import TokenizedRow, tokenize_rows
from qwen3ft.data.collators import IGNORED_LABEL
from qwen3ft.evaluation.generation import OnProgress, in_batches, no_progress, pad_rows

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

TOKENS_PER_CHUNK = 512
"""Tokens whose logits exist at one time: 0.3 GB in fp32 for Qwen3's vocabulary of 151,936."""


@dataclass(frozen=True)
class RowLoss:
    """Negative log-likelihood of one answer in nats, and the tokens that it is summed over."""

    nats: float
    tokens: int


def mean_loss(losses: Sequence[RowLoss]) -> float:
    """Return the mean loss (nats) per answer token; NaN if there is no token."""
    tokens = sum(loss.tokens for loss in losses)
    return sum(loss.nats for loss in losses) / tokens if tokens else float("nan")


def answer_losses(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    rows: Sequence[Mapping[str, Any]],
    batch_size: int,
    progress: OnProgress = no_progress,
    *,
    escape: bool = False,
) -> list[RowLoss]:
    """Return the negative log-likelihood of each row's answer, in the order of `rows`.

    Reasoning and end token count as part of the answer, the prompt does not. In a conversation only
    the last turn counts: it is the one that `answer_questions` writes.

    Raises:
        OutOfMemoryError: not even one row fits.
        TokenizerError: the chat template cannot be used.
    """
    encoded = tokenize_rows(tokenizer, rows, train_turns="last", escape=escape)
    order = sorted(range(len(encoded)), key=lambda index: (-len(encoded[index].input_ids), index))
    nats: dict[int, float] = {}

    def run(batch: Sequence[int]) -> list[float]:
        return _summed_losses(model, [encoded[index] for index in batch])

    for batch, losses in in_batches(order, batch_size, run):
        nats.update(zip(batch, losses, strict=True))
        progress(len(nats))
    tokens = [sum(end - start for start, end in row.trained) for row in encoded]
    return [RowLoss(nats[index], tokens[index]) for index in range(len(encoded))]


def _summed_losses(model: PreTrainedModel, rows: Sequence[TokenizedRow]) -> list[float]:
    """Return the summed negative log-likelihood of each row's trained tokens."""
    import torch

    width = max(len(row.input_ids) for row in rows)
    # Padding stands after the tokens, where causal attention cannot see it: any value will do.
    inputs = pad_rows([row.input_ids for row in rows], width, 0).to(model.device)
    labels = pad_rows([_labels(row) for row in rows], width, IGNORED_LABEL).to(model.device)
    # Position t predicts token t + 1.
    row_index, place = (labels[:, 1:] != IGNORED_LABEL).nonzero(as_tuple=True)
    causal = model.get_base_model() if hasattr(model, "get_base_model") else model
    totals = torch.zeros(len(rows), dtype=torch.float64)
    with torch.no_grad():
        hidden = causal.get_decoder()(input_ids=inputs, use_cache=False)[0]
        # Logits of all positions would take 0.6 MB a token: apply the head to answers, in chunks.
        for start in range(0, len(place), TOKENS_PER_CHUNK):
            chunk = slice(start, start + TOKENS_PER_CHUNK)
            states = hidden[row_index[chunk], place[chunk]]
            logits = causal.get_output_embeddings()(states).float()
            targets = labels[row_index[chunk], place[chunk] + 1]
            losses = torch.nn.functional.cross_entropy(logits, targets, reduction="none")
            totals.index_add_(0, row_index[chunk].cpu(), losses.double().cpu())
    sums: list[float] = totals.tolist()
    return sums


def _labels(row: TokenizedRow) -> list[int]:
    labels = [IGNORED_LABEL] * len(row.input_ids)
    for start, end in row.trained:
        labels[start:end] = row.input_ids[start:end]
    return labels
