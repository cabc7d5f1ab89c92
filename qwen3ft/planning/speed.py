"""How fast a plan would train, estimated from operations and bytes: an estimate, never a promise.

Time of one packed row of T tokens in L blocks (c: bytes of the compute type; H, I, Q, K, V: hidden,
MLP, query features, key features, vocabulary; S: length of a typical sequence):

    products    operations / (peak x PRODUCT_SHARE)       `FusedSizes.operations` without attention:
                                                          forward, backward, and what runs again
    attention   operations / (peak x attention_share(S))
    bytes       (c T (L (13 I + 20 H + 9 Q + 5 K) + 4 V) + 5 x linear weights)
                / (bandwidth x BANDWIDTH_SHARE)           norms, rotation, SwiGLU, adapters, logits;
                                                          4-bit weights read, 16-bit written, twice

summed, but never less than the time in which the host queues the launches of L blocks, nor than
what waits in host memory takes to go and come back. A step is as many rows as its tokens need, and
STEP_SECONDS of the trainer's own.

The shares are fitted to the rows in `benchmarks/results/speed-h*.json` (4B, 8B and 14B, 256 to
131,072 tokens, 6 to 80 GB, H100 and H200): of 25, all lie within 11 % of the estimate and 17 within
3 %. `tests/planning/test_speed.py` holds it within 25 % of whatever is kept there. For other cards
the same shares are taken of what their makers publish: computed, not measured. Not covered: the
plain path, CPUs, evaluation, checkpoints, power limits, and a card that others use.
"""

from __future__ import annotations

import math

from qwen3ft.planning.fused_footprint import FusedSizes
from qwen3ft.planning.fused_settings import LAUNCH_SECONDS_PER_BLOCK
from qwen3ft.planning.gpu_specs import GpuSpec
from qwen3ft.planning.packing import row_tokens
from qwen3ft.planning.workload import Workload
from qwen3ft.records.base import Record
from qwen3ft.records.model import ModelShape

PRODUCT_SHARE = 0.63
"""Of a card's peak, what products reach in the step."""

BANDWIDTH_SHARE = 0.65
"""Of the memory's bandwidth, what everything between products reaches."""

STEP_SECONDS = 0.01

FLASH_SHARE, FLASH_HALF_TOKENS = 0.30, 600
"""Share of peak that FlashAttention nears for long sequences, and the length with half of it."""

CUDNN_TOKENS, CUDNN_SHARE = 16384, 0.55
"""From this length on cuDNN's attention is taken, which reaches this share of peak."""


class SpeedEstimate(Record):
    """What a step would take on a card; always an estimate."""

    card: str
    tokens_per_second: float
    seconds_per_step: float
    measured_gpu: bool

    @property
    def basis(self) -> str:
        """How much to trust it, in words."""
        return self.describe(measured=self.measured_gpu)

    @staticmethod
    def describe(*, measured: bool) -> str:
        """How much to trust an estimate for a card that was, or was not, measured on."""
        if measured:
            return "estimate; this kind of card was measured"
        return "estimate; computed, not measured"


def attention_share(sequence_tokens: int) -> float:
    """Share of a card's peak that attention over sequences of this length reaches."""
    if sequence_tokens < CUDNN_TOKENS:
        return FLASH_SHARE * sequence_tokens / (sequence_tokens + FLASH_HALF_TOKENS)
    return CUDNN_SHARE


def estimate_speed(
    card: GpuSpec,
    work: Workload,
    *,
    sequences_per_step: int,
    typical_tokens: float,
) -> SpeedEstimate | None:
    """Real tokens a second of training; None for a plan that is not of the fused path on a GPU.

    Args:
        card: Where.
        work: The plan's settings.
        sequences_per_step: The effective batch.
        typical_tokens: Mean length of a sequence.
    """
    if work.memory.kernels != "fused" or work.device != "cuda":
        return None
    tokens = sequences_per_step * typical_tokens
    rows = math.ceil(tokens / work.capacity_tokens)
    row = row_tokens(math.ceil(tokens / rows))
    seconds = rows * _row_seconds(card, work, row, math.ceil(typical_tokens))
    seconds += STEP_SECONDS
    return SpeedEstimate(
        card=card.name,
        tokens_per_second=tokens / seconds,
        seconds_per_step=seconds,
        measured_gpu=card.measured,
    )


def _row_seconds(card: GpuSpec, work: Workload, row: int, typical: int) -> float:
    """Of one packed row of `row` tokens."""
    sizes = FusedSizes(work)
    levels = sizes.levels(row, work.memory.activation_bytes)
    products = sizes.operations(row, levels, 0)
    attention = sizes.operations(row, levels, typical) - products
    peak, bandwidth = card.bf16_tflops * 1e12, card.bandwidth_gbps * 1e9
    seconds = products / (peak * PRODUCT_SHARE)
    seconds += attention / (peak * attention_share(typical))
    seconds += _bytes_moved(work.shape, work.compute_bytes, row) / (bandwidth * BANDWIDTH_SHARE)
    seconds = max(seconds, LAUNCH_SECONDS_PER_BLOCK * work.shape.num_hidden_layers)
    if work.memory.offload_activations:
        per_token = sizes.kept_per_token()
        there_and_back = 2 * row * sum(per_token[level] for level in levels)
        seconds = max(seconds, there_and_back / (card.bus_gbps * 1e9))
    return seconds


def _bytes_moved(shape: ModelShape, compute_bytes: int, row: int) -> float:
    """Bytes that forward and backward of a row read and write beside the products."""
    query = shape.num_attention_heads * shape.head_dim
    key = shape.num_key_value_heads * shape.head_dim
    block = 13 * shape.intermediate_size + 20 * shape.hidden_size + 9 * query + 5 * key
    values = row * (shape.num_hidden_layers * block + 4 * shape.vocab_size)
    return compute_bytes * values + 5 * shape.linear_parameters
