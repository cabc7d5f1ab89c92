"""What the fused path can do with a model and rows: every combination, and how fast each could be.

Guarantees: pure and deterministic; nothing here depends on the budget, so one list serves a table
of budgets. Speed is estimated from products alone, in tokens that pass the model: an absolute
prediction it is not, but it weighs fewer micro-batches against less computed again, which is what
the budget is spent on. For people, `qwen3ft.planning.speed` counts the rest too.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property, lru_cache

from qwen3ft.planning.fused_footprint import FusedSizes, linear_parameters
from qwen3ft.planning.packing import divisors, row_tokens
from qwen3ft.planning.recompute import Level
from qwen3ft.planning.workload import Workload
from qwen3ft.records.model import ModelShape

CHUNK_TOKENS = (16384, 8192, 4096, 2048)
LOSS_CHUNK_TOKENS = (2048, 1024, 512, 256, 128)
FLOPS_PER_SECOND = 600e12
"""Of large bf16 products on an H200, measured in the step; slower cards make launches cheaper by
comparison, so they are only ever given too few micro-batches, which costs little."""

LAUNCH_SECONDS_PER_BLOCK = 4e-3
"""Time in which the host queues one block's forward and backward, measured: no micro-batch takes
less."""

WEIGHT_PASS_TOKENS = 200
"""Dequantising weights once takes about as long as passing this many tokens through them: 2.5 bytes
a weight at 4.8 TB/s, against 2 operations a token and weight at 800 TFLOP/s, on an H200; cards
from the RTX 4090 on have about that ratio."""

OFFLOAD_BYTES_PER_SECOND = 20e9
"""Between device and host, a modest PCIe 4.0 x 16; it runs beside the computation."""

OVERLAPPED_BYTES_PER_SECOND = 33e9
"""What the forward of an H200 may send to the host: PCIe 5.0 x 16 takes 50e9. A card at half of
that bus, PCIe 4.0, has less than half the speed too, so it has the time."""

HOST_SHARE = 0.5
"""Of the host's memory, what may hold activations: it is pinned, and others need the rest."""


@dataclass(frozen=True, eq=False)
class Option:
    """A candidate, and what of it no budget changes.

    Attributes:
        place: In the order of candidates, which decides between equally fast ones.
        work: Its settings, without what a row may take.
        least: Bytes of the largest row with as little kept as is allowed.
        most: The same with as much kept as is allowed.
        everything: The same with everything kept.
        asked: Effective batch and typical tokens, of all candidates.
    """

    place: int
    work: Workload
    least: int
    most: int
    everything: int
    asked: tuple[int, int]

    @cached_property
    def least_seconds(self) -> float:
        """Of a typical optimizer step with nothing computed again: no budget makes it faster."""
        return _seconds(self.work, *self.asked, self.everything)


@lru_cache(maxsize=8)
def every_option(
    first: Workload,
    effective: int,
    typical_tokens: int,
    recompute: str,
    host_bytes: int,
) -> tuple[Option, ...]:
    """Every candidate that the host has the memory for, in their order.

    They are the same for all budgets, so a table of those works them out once for each length.
    """
    found = []
    asked = (effective, typical_tokens)
    blocks = first.shape.num_hidden_layers
    spread = first.device == "cuda" and recompute == "auto"
    sizes_of_batch, groups = tuple(divisors(effective)), head_groups(first.shape)

    def away(work: Workload) -> int:
        return _blocks_offloaded_in_time(work, HOST_SHARE * host_bytes) if spread else 0

    for place, work in enumerate(
        candidates(first, sizes_of_batch, CHUNK_TOKENS, LOSS_CHUNK_TOKENS, groups, away)
    ):
        if waiting_bytes(work) > HOST_SHARE * host_bytes:
            continue
        sizes = FusedSizes(work)
        least = sizes.row_bytes(work.tokens, sizes.levels(work.tokens, 0))
        most = everything = sizes.row_bytes(work.tokens, (Level.KEEP_ALL,) * blocks)
        if recompute == "on" or work.memory.offload_activations:
            most = least
        elif recompute == "off":
            least = most
        found.append(Option(place, work, least, most, everything, asked))
    return tuple(found)


def head_groups(shape: ModelShape) -> tuple[int, ...]:
    """In how many parts the gradient of attention can be computed."""
    return tuple(n for n in (1, 2, 4, 8) if shape.num_key_value_heads % n == 0)


def candidates(
    first: Workload,
    sizes: tuple[int, ...],
    chunks: tuple[int, ...],
    loss_chunks: tuple[int, ...],
    groups: tuple[int, ...],
    blocks_away: Callable[[Workload], int] = lambda _: 0,
) -> Iterator[Workload]:
    """All combinations that differ: a chunk longer than any row is the whole row.

    Args:
        first: What is given.
        sizes: Sequences of a micro-batch.
        chunks: `chunk_tokens`, longest first.
        loss_chunks: `loss_chunk_tokens`, longest first.
        groups: `head_groups`.
        blocks_away: Blocks whose gate and up wait in host memory while all others stay.
    """
    # (what blocks keep, attention's output too)
    offloads = [(False, False)]
    if first.device == "cuda" and first.memory.gradient_checkpointing:
        offloads += [(True, True), (True, False)]
    for size in sizes:
        base = first.with_memory(kernels="fused", packing=True, micro_batch_size=size)
        # What leaves gate and up of some blocks room takes some itself: without it less fits.
        some = sorted({blocks_away(base), 0}, reverse=True)
        ways = [(*offloads[0], blocks) for blocks in some] + [(*way, 0) for way in offloads[1:]]
        longest = max(base.tokens, row_tokens(base.memory.eval_batch_size * base.eval_tokens))
        for chunk, loss, group, (offload, attention, blocks) in itertools.product(
            _distinct(chunks, longest), _distinct(loss_chunks, longest), groups, ways
        ):
            yield base.with_memory(
                chunk_tokens=chunk,
                loss_chunk_tokens=loss,
                head_groups=group,
                offload_activations=offload,
                offload_attention=attention,
                offloaded_mlp_blocks=blocks,
            )


def _distinct(chunks: tuple[int, ...], longest_tokens: int) -> tuple[int, ...]:
    """Of chunks, longest first, the first of those that cut rows of this length alike."""
    whole = sum(chunk >= longest_tokens for chunk in chunks)
    return chunks[:1] + chunks[max(1, whole) :]


def _blocks_offloaded_in_time(work: Workload, host_bytes: float) -> int:
    """Blocks whose gate and up leave the device while the forward runs, and fit the host."""
    per_token = 2 * work.compute_bytes * work.shape.intermediate_size
    forward_seconds = 2 * linear_parameters(work.shape) / FLOPS_PER_SECOND  # a token
    in_time = OVERLAPPED_BYTES_PER_SECOND * forward_seconds / per_token
    return int(min(in_time, host_bytes / (per_token * work.tokens)))


def waiting_bytes(work: Workload) -> int:
    """Host memory that activations of the largest row take."""
    if not work.memory.offload_activations:
        return 0
    sizes = FusedSizes(work)
    per_token = sizes.kept_per_token()
    levels = sizes.levels(work.tokens, 0)
    return work.tokens * sum(levels.count(level) * per_token[level] for level in set(levels))


def step_seconds(work: Workload, effective: int, typical_tokens: int) -> float:
    """Estimated time of a typical optimizer step on an H200, for comparison alone."""
    return _seconds(work, effective, typical_tokens, work.memory.activation_bytes)


def _seconds(work: Workload, effective: int, typical_tokens: int, room_bytes: int) -> float:
    """The same where a row may take `room_bytes`."""
    shape, memory = work.shape, work.memory
    tokens = effective * typical_tokens
    micro_batches = math.ceil(tokens / work.capacity_tokens)
    row = row_tokens(math.ceil(tokens / micro_batches))
    sizes = FusedSizes(work)
    levels = sizes.levels(row, room_bytes)
    head = shape.vocab_size * shape.hidden_size
    chunks = math.ceil(row / memory.chunk_tokens)
    passes = (
        1
        + 0.1 * chunks
        + 0.5 * head / linear_parameters(shape) * math.ceil(row / memory.loss_chunk_tokens)
    )
    operations = sizes.operations(row, levels, typical_tokens)
    operations += 4 * linear_parameters(shape) * WEIGHT_PASS_TOKENS * passes
    # Groups of heads read the same tensors again.
    seconds = operations * (1 + 0.01 * (memory.head_groups - 1)) / FLOPS_PER_SECOND
    seconds = max(seconds, LAUNCH_SECONDS_PER_BLOCK * shape.num_hidden_layers)
    if work.memory.offload_activations:
        transfer = 2 * waiting_bytes(work) * row / work.tokens
        seconds = 1.1 * max(seconds, transfer / OFFLOAD_BYTES_PER_SECOND)
    return micro_batches * seconds
