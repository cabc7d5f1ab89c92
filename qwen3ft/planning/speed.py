"""Estimate the time of an optimizer step of the fused path, from operations and bytes.

Two estimates share one model of a step: it runs as many packed rows as its tokens need, and a row
takes as long as the slowest of computing, queueing the launches, and moving offloaded activations
to the host and back. They differ in how they estimate computing:

- `ranking_seconds`, for the search: products at the rate of an H200, and passes over the weights.
- `estimate_speed`, for people: a roofline of the GPU. For a row of T tokens in L blocks (c: bytes
  of the compute type; H, I, Q, K, V: hidden, MLP, query features, key features, vocabulary;
  S: length of a typical sequence):

      products    operations / (peak x PRODUCT_SHARE)
      attention   operations / (peak x attention_share(S))
      the rest    (c T (L (13 I + 20 H + 9 Q + 5 K) + 4 V) + 5 x linear weights)
                  / (bandwidth x BANDWIDTH_SHARE)
                  bytes of norms, rotation, SwiGLU, adapters and logits; weights read in 4 bits,
                  written in 16

The shares are fitted to the rows in `benchmarks/results/speed-h*.json` (4B, 8B and 14B, 256 to
131,072 tokens, 6 to 80 GB, H100 and H200): all 25 lie within 11 % of the estimate, 17 within 3 %.
For other GPUs the same shares are applied to the maker's figures: computed, not measured.
Of several ranks each computes its rows, and then they sum gradients (`exchange_seconds`): computed
from the data sheets' links.

Not covered: the plain path, CPUs, evaluation, checkpoints, power limits, and a shared GPU.
"""

from __future__ import annotations

import math

from qwen3ft.planning.fused_sizes import FusedSizes, linear_parameters
from qwen3ft.planning.gpu_specs import GpuSpec, require_gpu_spec
from qwen3ft.planning.packing import round_up, row_tokens
from qwen3ft.planning.recompute import Level
from qwen3ft.planning.workload import Workload
from qwen3ft.records.base import Record
from qwen3ft.records.model import ModelShape

LAUNCH_SECONDS_PER_BLOCK = 4e-3
"""Time in which the host queues one block's forward and backward, measured: a lower bound of every
micro-batch."""

GRAPH_SECONDS_PER_BLOCK = 0.35e-3
"""The same where a row runs as CUDA graphs, with what is still launched one by one: 12.6 ms for a
row of 1,800 tokens in the 28 blocks of 0.6B on an H200's host."""

FLOPS_PER_SECOND = 600e12
"""Rate of large bf16 products on an H200, measured in the step."""

WEIGHT_PASS_TOKENS = 200
"""Tokens whose products take as long as dequantising the weights once: 2.5 bytes a weight at
4.8 TB/s, against 2 operations a token and weight at 800 TFLOP/s, on an H200. GPUs from the RTX 4090
on have about that ratio."""

OFFLOAD_BYTES_PER_SECOND = 20e9
"""Rate between device and host that the search assumes: a modest PCIe 4.0 x 16."""

OFFLOAD_OVERHEAD = 1.1
"""Factor on the time of a row that offloads its activations."""

GRAPH_OVERHEAD = 1.05
"""The same for a row that runs as CUDA graphs: longer padding, and 0.2 s to record each size."""

PRODUCT_SHARE = 0.63
"""Share of a GPU's peak that products reach in the step."""

BANDWIDTH_SHARE = 0.65
"""Share of the memory's bandwidth that everything between products reaches."""

STEP_SECONDS = 0.01
"""Time of a step outside its rows: clipping, the optimizer, logs."""

EXCHANGE_SECONDS = 5e-3
"""Time of an exchange beside its bytes: copies, two starts, a few channels, and what the processes
tell each other. All of it took 5.0 ms for the 50 MB of 4B on two H200 with NVLink, where the bytes
alone would take 0.1 to 0.2."""

FLASH_SHARE, FLASH_HALF_TOKENS = 0.30, 600
"""Share of peak that FlashAttention nears for long sequences, and the length with half of it."""

# As `training.fused.attention.LONG_TOKENS`, whose module imports torch; plans are made without.
CUDNN_TOKENS, CUDNN_SHARE = 16384, 0.55
"""Length from which cuDNN's attention is used, and the share of peak it reaches."""


class SpeedEstimate(Record):
    """Estimated speed of training, of all ranks together."""

    gpu: str
    tokens_per_second: float
    seconds_per_step: float
    measured_gpu: bool
    ranks: int = 1
    speedup: float = 1.0
    """Times the speed of one such GPU, under a plan for one."""

    @property
    def basis(self) -> str:
        """Words that say how far to trust the estimate."""
        if self.ranks > 1:
            return f"{self.speedup:.2f} x one GPU; {describe_basis(measured=False)}"
        return describe_basis(measured=self.measured_gpu)


def describe_basis(*, measured: bool) -> str:
    """Return how far to trust an estimate for a GPU that was, or was not, measured."""
    if measured:
        return "estimate; this kind of GPU was measured"
    return "estimate; computed, not measured"


def typical_rows(work: Workload) -> tuple[int, int]:
    """Return the packed rows of a typical step, as many for each rank, and the tokens of each."""
    tokens = work.step_sequences * work.typical_tokens
    rows = round_up(math.ceil(tokens / work.capacity_tokens), work.ranks)
    return rows, row_tokens(math.ceil(tokens / rows), graphs=work.memory.graphs)


def typical_levels(work: Workload) -> tuple[Level, ...]:
    """Return, per block, what is kept of a row of typical length."""
    _, row = typical_rows(work)
    return FusedSizes(work).levels(row, work.memory.activation_bytes)


def ranking_seconds(work: Workload, room_bytes: int | None = None) -> float:
    """Return the time of a typical step on an H200, to compare settings with each other.

    Args:
        work: The settings.
        room_bytes: Bytes a row may take; `activation_bytes` of the settings if None.
    """
    # The roofline would rank settings by the bandwidth of one GPU. Products alone weigh fewer
    # micro-batches against less recomputation, which holds on all of them: on slower GPUs launches
    # count less, so at worst they get too few micro-batches, which costs little.
    shape, memory = work.shape, work.memory
    rows, row = typical_rows(work)
    sizes = FusedSizes(work)
    levels = sizes.levels(row, memory.activation_bytes if room_bytes is None else room_bytes)
    head = shape.vocab_size * shape.hidden_size
    passes = (
        1
        + 0.1 * math.ceil(row / memory.chunk_tokens)
        + 0.5 * head / linear_parameters(shape) * math.ceil(row / memory.loss_chunk_tokens)
    )
    operations = sizes.operations(row, levels, work.typical_tokens)
    operations += 4 * linear_parameters(shape) * WEIGHT_PASS_TOKENS * passes
    # Each group of heads reads the same tensors again.
    computing = operations * (1 + 0.01 * (memory.head_groups - 1)) / FLOPS_PER_SECOND
    seconds = _row_seconds(sizes, row, levels, computing, OFFLOAD_BYTES_PER_SECOND)
    overhead = OFFLOAD_OVERHEAD if memory.offload_activations else 1.0
    return rows * seconds * (GRAPH_OVERHEAD if memory.graphs else overhead)


def is_launch_bound(gpu: GpuSpec | None, work: Workload) -> bool:
    """Return True if launching the kernels of a typical row takes longer than computing it.

    Args:
        gpu: The kind of GPU; an H200 if None, which is among the fastest.
        work: The settings.
    """
    _, row = typical_rows(work)
    gpu, sizes = gpu or require_gpu_spec("h200"), FusedSizes(work)
    levels = sizes.levels(row, work.memory.activation_bytes)
    seconds = _roofline_seconds(gpu, sizes, row, levels)
    return seconds < LAUNCH_SECONDS_PER_BLOCK * work.shape.num_hidden_layers


def estimate_speed(gpu: GpuSpec, work: Workload) -> SpeedEstimate | None:
    """Estimate the real tokens a second of training; None off the fused path or on a CPU.

    Args:
        gpu: The kind of GPU to estimate for; each rank has one.
        work: The plan's settings.
    """
    if work.memory.kernels != "fused" or work.device != "cuda":
        return None
    exchange = exchange_seconds(work, gpu.link_gbps * 1e9)
    seconds = rows_seconds(gpu, work) + exchange + STEP_SECONDS
    return SpeedEstimate(
        gpu=gpu.name,
        tokens_per_second=work.step_sequences * work.typical_tokens / seconds,
        seconds_per_step=seconds,
        measured_gpu=gpu.measured,
        ranks=work.ranks,
    )


def exchange_seconds(work: Workload, bytes_per_second: float) -> float:
    """Return the time in which the ranks sum their fp32 gradients (`training.ranks`).

    In each of two exchanges a rank sends all but its own share of them. Measured on two GPUs alone.
    """
    if work.ranks == 1:
        return 0.0
    sent = 2 * 4 * work.adapter.trainable_parameters * (work.ranks - 1) / work.ranks
    return sent / bytes_per_second + EXCHANGE_SECONDS


def rows_seconds(gpu: GpuSpec, work: Workload) -> float:
    """Return the time of a rank's rows of a step, with as much kept as the settings allow."""
    rows, row = typical_rows(work)
    sizes = FusedSizes(work)
    levels = sizes.levels(row, work.memory.activation_bytes)
    computing = _roofline_seconds(gpu, sizes, row, levels)
    return rows // work.ranks * _row_seconds(sizes, row, levels, computing, gpu.bus_gbps * 1e9)


def attention_share(sequence_tokens: int) -> float:
    """Return the share of a GPU's peak that attention over sequences of this length reaches."""
    if sequence_tokens < CUDNN_TOKENS:
        return FLASH_SHARE * sequence_tokens / (sequence_tokens + FLASH_HALF_TOKENS)
    return CUDNN_SHARE


def _row_seconds(
    sizes: FusedSizes,
    row: int,
    levels: tuple[Level, ...],
    computing_seconds: float,
    bus_bytes_per_second: float,
) -> float:
    """Return the time of one packed row: computing, launches or transfers, whichever is slowest."""
    # The slowest, not the sum: the host queues ahead, and copies run on a stream of their own.
    of_block = GRAPH_SECONDS_PER_BLOCK if sizes.memory.graphs else LAUNCH_SECONDS_PER_BLOCK
    seconds = max(computing_seconds, of_block * sizes.shape.num_hidden_layers)
    if sizes.memory.offload_activations:
        there_and_back = 2 * sizes.offloaded_bytes(row, levels)
        seconds = max(seconds, there_and_back / bus_bytes_per_second)
    return seconds


def _roofline_seconds(
    gpu: GpuSpec, sizes: FusedSizes, row: int, levels: tuple[Level, ...]
) -> float:
    """Return the time that `gpu` computes one row (see the module docstring)."""
    typical_tokens = sizes.work.typical_tokens
    products = sizes.operations(row, levels, 0)
    attention = sizes.operations(row, levels, typical_tokens) - products
    peak, bandwidth = gpu.bf16_tflops * 1e12, gpu.bandwidth_gbps * 1e9
    seconds = products / (peak * PRODUCT_SHARE)
    seconds += attention / (peak * attention_share(typical_tokens))
    moved = _bytes_moved(sizes.shape, sizes.compute_bytes, row)
    return seconds + moved / (bandwidth * BANDWIDTH_SHARE)


def _bytes_moved(shape: ModelShape, compute_bytes: int, row: int) -> float:
    """Return the bytes that forward and backward of a row read and write beside the products."""
    query, key = shape.query_features, shape.key_features
    block = 13 * shape.intermediate_size + 20 * shape.hidden_size + 9 * query + 5 * key
    values = row * (shape.num_hidden_layers * block + 4 * shape.vocab_size)
    return compute_bytes * values + 5 * shape.linear_parameters
