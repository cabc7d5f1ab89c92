"""Candidates of the fused path: every combination of levers, and its best possible time.

Nothing here depends on the budget, so one list serves a whole table of budgets. The search for the
fastest candidate that fits is `qwen3ft.planning.fused_search`.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property, lru_cache

from qwen3ft.planning.fused_sizes import FusedSizes, linear_parameters
from qwen3ft.planning.packing import divisors, row_tokens
from qwen3ft.planning.recompute import Level
from qwen3ft.planning.speed import FLOPS_PER_SECOND, ranking_seconds
from qwen3ft.planning.workload import Workload
from qwen3ft.records.model import ModelShape

MLP_CHUNKS_TOKENS = (16384, 8192, 4096, 2048)
LOSS_CHUNKS_TOKENS = (2048, 1024, 512, 256, 128)

OVERLAPPED_BYTES_PER_SECOND = 33e9
"""Rate at which the forward of an H200 may send to the host; PCIe 5.0 x 16 reaches 50e9. A GPU on
half of that bus, PCIe 4.0, has less than half the speed too, so it has the time."""

LONGEST_GRAPH_TOKENS = 16384
"""Rows from this length on have no graphs: computing takes longer than any launching, and attention
may be cuDNN's, which is launched sequence by sequence."""

HOST_SHARE = 0.5
"""Share of the host's memory that activations may take: it is pinned, and others need the rest."""


@dataclass(frozen=True, eq=False)
class Candidate:
    """A combination of levers, and what of it no budget changes."""

    place: int
    """Position among all candidates, which decides between equally fast ones."""
    work: Workload
    """Its settings, without `activation_bytes`."""
    least: int
    """Bytes of the largest row with as little kept as is allowed."""
    most: int
    """Bytes of the largest row with as much kept as is allowed."""
    everything: int
    """Bytes of the largest row with everything kept."""

    @cached_property
    def least_seconds(self) -> float:
        """Time of a typical step with nothing recomputed: no budget makes it faster."""
        return ranking_seconds(self.work, self.everything)


@lru_cache(maxsize=8)
def fused_candidates(first: Workload, recompute: str, host_bytes: int) -> tuple[Candidate, ...]:
    """Return every candidate that the host has the memory for, in order.

    Cached, since a table of budgets asks for the same ones again.

    Args:
        first: What is given: model, adapter, precision, rows.
        recompute: `config.gradient_checkpointing`.
        host_bytes: Memory of the host.
    """
    found = []
    blocks = first.shape.num_hidden_layers
    # With 'on' or 'off' the config says what blocks keep, and none sends gate and up to the host.
    spread = first.device == "cuda" and recompute == "auto"

    def offloadable(work: Workload) -> int:
        return offloadable_blocks(work, HOST_SHARE * host_bytes) if spread else 0

    for place, work in enumerate(
        combinations(
            first,
            micro_batch_sizes(first.step_sequences, first.ranks),
            MLP_CHUNKS_TOKENS,
            LOSS_CHUNKS_TOKENS,
            head_groups(first.shape),
            offloadable,
        )
    ):
        if host_bytes_needed(work) > HOST_SHARE * host_bytes:
            continue
        sizes = FusedSizes(work)
        least = sizes.row_bytes(work.tokens, sizes.levels(work.tokens, 0))
        most = everything = sizes.row_bytes(work.tokens, (Level.KEEP_ALL,) * blocks)
        if recompute == "on" or work.memory.offload_activations:
            most = least
        elif recompute == "off":
            least = most
        found.append(Candidate(place, work, least, most, everything))
    return tuple(found)


def micro_batch_sizes(effective: int, ranks: int) -> tuple[int, ...]:
    """Return the divisors of a step's sequences, without those beyond the share of a rank.

    A step is dealt as one micro-batch a rank at least, so larger ones would take room for rows that
    never come. The least that holds a share stays, where the ranks do not divide the step.
    """
    share = -(-effective // ranks)
    sizes = divisors(effective)
    return tuple(size for size in sizes if size <= min(each for each in sizes if each >= share))


def head_groups(shape: ModelShape) -> tuple[int, ...]:
    """Return the numbers of parts in which the gradient of attention can be computed."""
    return tuple(n for n in (1, 2, 4, 8) if shape.num_key_value_heads % n == 0)


def combinations(
    first: Workload,
    micro_batches: tuple[int, ...],
    mlp_chunks: tuple[int, ...],
    loss_chunks: tuple[int, ...],
    groups: tuple[int, ...],
    offloadable: Callable[[Workload], int] = lambda _: 0,
) -> Iterator[Workload]:
    """Yield all combinations of levers that differ in effect.

    Args:
        first: What is given.
        micro_batches: Values of `micro_batch_size`.
        mlp_chunks: Values of `chunk_tokens`, longest first.
        loss_chunks: Values of `loss_chunk_tokens`, longest first.
        groups: Values of `head_groups`.
        offloadable: Returns the blocks whose gate and up can wait in host memory.
    """
    on_gpu = first.device == "cuda"
    # (offload_activations, offload_attention)
    offloads = [(False, False)]
    if on_gpu and first.memory.gradient_checkpointing:
        offloads += [(True, True), (True, False)]
    for size in micro_batches:
        base = first.with_memory(kernels="fused", packing=True, micro_batch_size=size)
        with_graphs = base.with_memory(graphs=True)
        # What waits in host memory comes and goes on a stream of its own, which no graph has.
        # Offloading gate and up takes room for what is in transit, so without it less may fit.
        mlp_blocks = sorted({offloadable(base), 0}, reverse=True)
        ways = [(*offloads[0], blocks, False) for blocks in mlp_blocks]
        ways += (
            [(*offloads[0], 0, True)]
            if on_gpu and with_graphs.tokens < LONGEST_GRAPH_TOKENS
            else []
        )
        ways += [(*way, 0, False) for way in offloads[1:]]
        longest = max(base.tokens, row_tokens(base.memory.eval_batch_size * base.eval_tokens))
        for chunk, loss, group, (offload, attention, blocks, graphs) in itertools.product(
            _distinct(mlp_chunks, longest), _distinct(loss_chunks, longest), groups, ways
        ):
            yield base.with_memory(
                chunk_tokens=chunk,
                loss_chunk_tokens=loss,
                head_groups=group,
                offload_activations=offload,
                offload_attention=attention,
                offloaded_mlp_blocks=blocks,
                graphs=graphs,
            )


def _distinct(chunks: tuple[int, ...], longest_tokens: int) -> tuple[int, ...]:
    """Drop chunk sizes that split rows of this length the same way as a larger one."""
    whole = sum(chunk >= longest_tokens for chunk in chunks)
    return chunks[:1] + chunks[max(1, whole) :]


def offloadable_blocks(work: Workload, host_bytes: float) -> int:
    """Return the blocks whose gate and up leave the device in time and fit the host."""
    # In time: while the forward runs, so that it never waits for the bus.
    per_token = 2 * work.compute_bytes * work.shape.intermediate_size
    forward_seconds = 2 * linear_parameters(work.shape) / FLOPS_PER_SECOND  # a token
    in_time = OVERLAPPED_BYTES_PER_SECOND * forward_seconds / per_token
    return int(min(in_time, host_bytes / (per_token * work.tokens)))


def host_bytes_needed(work: Workload) -> int:
    """Return the bytes of host memory that offloaded activations of the largest row take."""
    if not work.memory.offload_activations:
        return 0
    sizes = FusedSizes(work)
    return sizes.offloaded_bytes(work.tokens, sizes.frugal_levels)
