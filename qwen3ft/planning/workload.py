"""What has to fit: a model, an adapter, rows of some length, and the machine they meet on."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from qwen3ft.config import TrainingConfig
from qwen3ft.planning.packing import row_tokens
from qwen3ft.records.data import DatasetManifest
from qwen3ft.records.machine import EnvironmentReport
from qwen3ft.records.model import AdapterSpec, ModelShape, ModelSnapshot


@dataclass(frozen=True)
class Workload:
    """What is trained at one time, and the levers that trade time for memory.

    Attributes:
        device: 'cuda' or 'cpu'.
        compute_dtype: 'bfloat16', 'float16' or 'float32'.
        quantization: 'nf4-double', 'nf4' or 'fp4'.
        micro_batch_size: Sequences per forward pass.
        sequence_tokens: Length of the longest of them, padding included.
        gradient_checkpointing: Whether each layer is computed again in backward.
        loss_chunk_tokens: Tokens whose logits exist at one time.
        offload_activations: Whether saved activations wait in host memory.
        offload_optimizer: Whether the optimizer's moments stay there.
        kernels: 'plain' for transformers and PEFT, 'fused' for `qwen3ft.training.fused`.
        offload_attention: Fused: whether attention's output waits there too.
        offloaded_mlp_blocks: Fused: most blocks whose gate and up wait in host memory.
        activation_bytes: Fused: what a packed row may take.
        chunk_tokens: Fused: tokens whose wide intermediates exist at one time.
        head_groups: Fused: parts in which the gradient of attention is computed.
        packing: Whether a micro-batch is one row of as many tokens, instead of padded rows.
        varied_rows: Whether sequences, and so packed rows, differ in length.
        eval_batch_size: Sequences per forward pass of an evaluation.
        eval_tokens: Length of the longest held-out sequence, padding included.
    """

    device: str
    compute_dtype: str
    quantization: str
    micro_batch_size: int
    sequence_tokens: int
    gradient_checkpointing: bool
    loss_chunk_tokens: int
    offload_activations: bool = False
    offload_optimizer: bool = False
    kernels: Literal["plain", "fused"] = "plain"
    offload_attention: bool = False
    offloaded_mlp_blocks: int = 0
    activation_bytes: int = 0
    chunk_tokens: int = 0
    head_groups: int = 1
    packing: bool = False
    varied_rows: bool = True
    eval_batch_size: int = 1
    eval_tokens: int = 1

    @property
    def compute_bytes(self) -> int:
        """Bytes of one number of the compute type."""
        return 4 if self.compute_dtype == "float32" else 2

    @property
    def capacity_tokens(self) -> int:
        """Most tokens of a packed micro-batch: as many as the padded rows in its place hold."""
        return self.micro_batch_size * self.sequence_tokens

    @property
    def tokens(self) -> int:
        """Tokens of one micro-batch, padding included."""
        return row_tokens(self.capacity_tokens) if self.packing else self.capacity_tokens

    @property
    def keys_per_query(self) -> int:
        """Tokens of a row: the width of the attention mask."""
        return self.tokens if self.packing else self.sequence_tokens


PADDING_MULTIPLE_TOKENS = 8


@dataclass(frozen=True)
class FitRequest:
    """All that the choice of settings depends on, without weights and rows.

    Attributes:
        config: What is asked.
        environment: Where it runs; a described card has no UUID.
        model_name: For people.
        shape: Of the model.
        compute_dtype: 'bfloat16' or 'float32'.
        quantization: Which of the config's is used.
        adapter: What is trained.
        longest_tokens: Of the rows trained on, padding included.
        typical_tokens: Their mean length.
        held_out_tokens: Longest held-out row, padding included.
    """

    config: TrainingConfig
    environment: EnvironmentReport
    model_name: str
    shape: ModelShape
    compute_dtype: Literal["bfloat16", "float32"]
    quantization: str
    adapter: AdapterSpec
    longest_tokens: int
    typical_tokens: int
    held_out_tokens: int

    @property
    def smallest_workload(self) -> Workload:
        """One sequence at a time; what the candidates of both paths start from."""
        return Workload(
            device=self.environment.device,
            compute_dtype=self.compute_dtype,
            quantization=self.quantization,
            micro_batch_size=1,
            sequence_tokens=self.longest_tokens,
            gradient_checkpointing=self.config.gradient_checkpointing != "off",
            loss_chunk_tokens=SMALLEST_LOSS_CHUNK_TOKENS,
            packing=wants_packing(self.config, self.environment.device),
            varied_rows=self.typical_tokens < self.longest_tokens,
            eval_tokens=self.held_out_tokens,
        )


def request_for(
    config: TrainingConfig,
    environment: EnvironmentReport,
    model: ModelSnapshot,
    adapter: AdapterSpec,
    dataset: DatasetManifest,
) -> FitRequest:
    """The request of a run."""
    limit = config.max_sequence_length
    return FitRequest(
        config=config,
        environment=environment,
        model_name=model.source.model_name,
        shape=model.shape,
        compute_dtype=model.compute_dtype,
        quantization=model.quantization,
        adapter=adapter,
        longest_tokens=padded_length(dataset.train.longest_tokens, limit),
        typical_tokens=-(-dataset.train.tokens // dataset.train.rows),
        held_out_tokens=padded_length(dataset.dev.longest_tokens, limit),
    )


def padded_length(longest_tokens: int, limit_tokens: int) -> int:
    """Tokens of the longest row as the collator pads it, never 0."""
    length = max(1, min(longest_tokens, limit_tokens))
    return -(-length // PADDING_MULTIPLE_TOKENS) * PADDING_MULTIPLE_TOKENS


SMALLEST_LOSS_CHUNK_TOKENS = 256


def wants_packing(config: TrainingConfig, device: str) -> bool:
    """On a GPU, where each micro-batch costs; on a CPU it was measured no faster than padding."""
    return config.packing == "on" or (config.packing == "auto" and device == "cuda")
