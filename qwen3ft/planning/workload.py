"""What has to fit: a model, an adapter, rows of some length, and the machine they meet on."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from qwen3ft.config import TrainingConfig
from qwen3ft.planning.footprint import Workload
from qwen3ft.planning.plain_settings import SMALLEST_LOSS_CHUNK_TOKENS, wants_packing
from qwen3ft.records.data import DatasetManifest
from qwen3ft.records.plan import AdapterSpec, EnvironmentReport, ModelShape, ModelSnapshot

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
