"""Find the fused settings that fit the memory budget and are estimated to be fastest.

Pure and deterministic; what is returned fits. The candidates are
`qwen3ft.planning.fused_settings`.
"""

from __future__ import annotations

from dataclasses import replace
from functools import lru_cache

from qwen3ft.planning.footprint import predict_memory, total_bytes
from qwen3ft.planning.fused_settings import (
    HOST_SHARE,
    LOSS_CHUNKS_TOKENS,
    MLP_CHUNKS_TOKENS,
    Candidate,
    combinations,
    fused_candidates,
    head_groups,
    host_bytes_needed,
)
from qwen3ft.planning.fused_sizes import FusedSizes
from qwen3ft.planning.gpu_specs import GpuSpec, require_gpu_spec
from qwen3ft.planning.recompute import Level
from qwen3ft.planning.speed import (
    is_launch_bound,
    ranking_seconds,
    rows_seconds,
    typical_rows,
)
from qwen3ft.planning.workload import Workload
from qwen3ft.records.machine import EnvironmentReport
from qwen3ft.records.model import AdapterSpec

OLDEST_CAPABILITY = (8, 0)
"""Ampere: the first with bfloat16, which the kernels are written for."""


def why_not_fused(
    environment: EnvironmentReport, compute_dtype: str, adapter: AdapterSpec
) -> str | None:
    """Return what the fused path lacks to run here; None if it can run."""
    if adapter.dropout:
        return f"lora_dropout is {adapter.dropout:g}; the fused path has none."
    if not environment.gpus:
        return "No CUDA device is visible; on a CPU the fused path has no faster kernels."
    gpu = environment.gpus[0]
    capability = tuple(int(part) for part in (gpu.compute_capability or "0.0").split("."))
    if capability < OLDEST_CAPABILITY or compute_dtype != "bfloat16":
        return f"{gpu.name} has no bfloat16 (compute capability {gpu.compute_capability})."
    if "triton" not in environment.versions:
        return "Triton is not installed."
    return None


def fastest_fused(
    first: Workload,
    limit_bytes: int,
    *,
    recompute: str,
    host_bytes: int,
    gpu: GpuSpec | None = None,
) -> Workload | None:
    """Return the settings estimated to be fastest among those that fit; None if none does.

    Args:
        first: What is given: model, adapter, precision, rows.
        limit_bytes: The budget.
        recompute: `config.gradient_checkpointing`.
        host_bytes: Memory of the host.
        gpu: The kind of GPU, if it is a known one.
    """
    every = fused_candidates(first, recompute, host_bytes)
    shape = first.shape
    # A lower bound, cheap to compute: most candidates need no prediction part by part.
    weights_bytes = shape.linear_parameters // 2 + shape.embedding_parameters * first.compute_bytes
    possible = [each for each in every if weights_bytes + each.least <= limit_bytes]
    possible.sort(key=lambda each: (each.least_seconds, each.place))
    without = [each for each in possible if not each.work.memory.graphs]
    fastest = _fastest(without, limit_bytes)
    if fastest is not None and is_launch_bound(gpu, fastest):
        here = gpu or require_gpu_spec("h200")
        return _with_graphs_if_faster(fastest, possible, limit_bytes, here)
    if fastest is None and first.device == "cuda" and not first.memory.offload_optimizer:
        # Moments in host memory cost time in each step: the last resort.
        lean = [
            replace(each, work=each.work.with_memory(offload_optimizer=True)) for each in without
        ]
        fastest = _fastest(lean, limit_bytes)
    return fastest


def _with_graphs_if_faster(
    fastest: Workload, possible: list[Candidate], limit_bytes: int, gpu: GpuSpec
) -> Workload:
    """Return the fastest settings with graphs if they are faster than `fastest` on `gpu`."""
    # The ranking is an H200's, on which many small rows with graphs are fast. Slower GPUs compute
    # them for longer than they launch, so no more rows than without are tried, too.
    graphs = [each for each in possible if each.work.memory.graphs]
    rows, _ = typical_rows(fastest)
    as_few = [each for each in graphs if typical_rows(each.work)[0] <= rows]
    found = (_fastest(some, limit_bytes) for some in (graphs, as_few))
    every = (fastest, *(each for each in found if each is not None))
    return min(every, key=lambda each: rows_seconds(gpu, each))


def _fastest(possible: list[Candidate], limit_bytes: int) -> Workload | None:
    """Return the fastest candidate that fits; `possible` is sorted by best possible time."""
    best: tuple[float, int, Workload] | None = None
    for candidate in possible:
        # In order of their best possible time, so none of the others can be faster.
        if best is not None and candidate.least_seconds > best[0]:
            break
        fitted = _fill(candidate, limit_bytes)
        if fitted is None:
            continue
        seconds = ranking_seconds(fitted)
        if best is None or (seconds, candidate.place) < best[:2]:
            best = seconds, candidate.place, fitted
    return best[2] if best else None


def _fill(candidate: Candidate, limit_bytes: int) -> Workload | None:
    """Return its settings with as much room for rows as the budget leaves; None if too little."""
    work, least, most = candidate.work, candidate.least, candidate.most
    total_of_least = _total_bytes(work.with_memory(activation_bytes=least))
    if total_of_least > limit_bytes:
        return None
    total_of_most = _total_bytes(work.with_memory(activation_bytes=most))
    if total_of_most <= limit_bytes:
        room = most
    else:
        # Everything but the rows is the same in both, so the total is linear in between.
        share = (limit_bytes - total_of_least) / (total_of_most - total_of_least)
        room = least + int(share * (most - least))
    recompute = room < candidate.everything
    return work.with_memory(activation_bytes=room, gradient_checkpointing=recompute)


def most_frugal_fused(first: Workload, host_bytes: int) -> Workload:
    """Return the settings that take least: one sequence at a time, and every lever pulled."""
    # On a CPU the moments are in host memory as it is.
    first = first.with_memory(offload_optimizer=first.device == "cuda")
    blocks, settings = first.shape.num_hidden_layers, []
    smallest = MLP_CHUNKS_TOKENS[-1:], LOSS_CHUNKS_TOKENS[-1:]
    for work in combinations(first, (1,), *smallest, head_groups(first.shape)):
        if host_bytes_needed(work) <= HOST_SHARE * host_bytes:
            sizes = FusedSizes(work)
            recomputed = sizes.levels(work.tokens, 0)
            may_recompute = first.memory.gradient_checkpointing
            levels = recomputed if may_recompute else (Level.KEEP_ALL,) * blocks
            room_bytes = sizes.row_bytes(work.tokens, levels)
            settings.append(work.with_memory(activation_bytes=room_bytes))
    return min(settings, key=_total_bytes)


@lru_cache(maxsize=1 << 15)
def _total_bytes(work: Workload) -> int:
    return total_bytes(predict_memory(work))
