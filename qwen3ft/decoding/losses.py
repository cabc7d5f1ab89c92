"""Losses of given answers, packed, for several models at once."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch

from qwen3ft.decoding.decoder import Decoder
from qwen3ft.decoding.reading import READ_TEXTS

LOSS_ROWS = 128
"""Targets whose logits exist at a time: 78 MB in fp32 for Qwen3's vocabulary of 151,936."""


@dataclass(frozen=True)
class LossQuery:
    """One text for one model.

    Attributes:
        ids: Token ids.
        targets: Half-open ranges of the tokens whose loss is summed; none begins at 0.
        model: Number of the adapter, or `BASE`.
    """

    ids: Sequence[int]
    targets: Sequence[tuple[int, int]]
    model: int


def summed_losses(
    decoder: Decoder, queries: Sequence[LossQuery], progress: Callable[[int], None]
) -> list[float]:
    """Return the summed negative log-likelihood of each query's targets, in nats.

    Args:
        decoder: An idle decoder.
        queries: Texts and their models.
        progress: Called with the number of texts done.
    """
    nats = [0.0] * len(queries)
    done = 0
    for batch in _batches(queries, decoder.sizes.chunk_tokens):
        for index, loss in zip(
            batch, _losses(decoder, [queries[index] for index in batch]), strict=True
        ):
            nats[index] = loss
        done += len(batch)
        progress(done)
    return nats


def _batches(queries: Sequence[LossQuery], chunk_tokens: int) -> Iterator[list[int]]:
    """Yield the queries that are read together, each a chunk or one longer text."""
    batch: list[int] = []
    tokens = 0
    for index in sorted(range(len(queries)), key=lambda index: len(queries[index].ids)):
        length = len(queries[index].ids)
        if batch and (tokens + length > chunk_tokens or len(batch) == READ_TEXTS):
            yield batch
            batch, tokens = [], 0
        batch.append(index)
        tokens += length
    if batch:
        yield batch


@torch.no_grad()
def _losses(decoder: Decoder, batch: Sequence[LossQuery]) -> list[float]:
    hidden = decoder.hidden([query.ids for query in batch], [query.model for query in batch])
    places: list[int] = []
    targets: list[int] = []
    owners: list[int] = []
    start = 0
    for owner, query in enumerate(batch):
        for first, end in query.targets:
            places += range(start + first - 1, start + end - 1)  # a token is predicted before it
            targets += query.ids[first:end]
            owners += [owner] * (end - first)
        start += len(query.ids)
    totals = torch.zeros(len(batch), dtype=torch.float64)
    for begin in range(0, len(places), LOSS_ROWS):
        part = slice(begin, begin + LOSS_ROWS)
        count = len(places[part])
        # always as many rows, so that a loss does not depend on the others
        padded = torch.tensor(places[part] + [0] * (LOSS_ROWS - count), device=hidden.device)
        wanted = torch.tensor(targets[part] + [0] * (LOSS_ROWS - count), device=hidden.device)
        losses = decoder.ops.cross_entropy(decoder.logits(hidden[padded]), wanted)
        totals.index_add_(0, torch.tensor(owners[part]), losses[:count].double().cpu())
    sums: list[float] = totals.tolist()
    return sums
