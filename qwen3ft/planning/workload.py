"""The workload of a step, and the request that a plan answers: model, adapter, rows, machine."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any, Literal

from qwen3ft.chat.templates import template_may_think
from qwen3ft.config import TrainingConfig
from qwen3ft.machine.gpu_choice import rank_count
from qwen3ft.planning.packing import row_tokens
from qwen3ft.records.data import DatasetManifest
from qwen3ft.records.machine import EnvironmentReport
from qwen3ft.records.model import AdapterSpec, ModelShape, ModelSnapshot
from qwen3ft.records.plan import MemorySettings, TrainPlan

PADDING_MULTIPLE_TOKENS = 8

TYPICAL_FILL = 0.42
"""Mean over longest row of the lengths in benchmarks/speed/cases.py (lognormal, cut)."""

SMALLEST_LOSS_CHUNK_TOKENS = 128
"""Smallest loss chunk of a plan where nothing else fits, and of the recovery ladder."""

SMALLEST_PLANNED_LOSS_CHUNK_TOKENS = 256
"""Smallest loss chunk the planner tries before its last resort; leaves recovery a smaller one."""


@dataclass(frozen=True)
class Workload:
    """A micro-batch on the device: everything that memory and speed depend on."""

    shape: ModelShape
    adapter: AdapterSpec
    device: str
    """'cuda' or 'cpu'."""
    compute_dtype: str
    """'bfloat16', 'float16' or 'float32'."""
    quantization: str
    """'nf4-double', 'nf4' or 'fp4'."""
    sequence_tokens: int
    """Length of the longest sequence, padding included."""
    typical_tokens: int
    """Mean length of a sequence."""
    step_sequences: int
    """Sequences of an optimizer step, of all ranks."""
    memory: MemorySettings
    varied_rows: bool = True
    """True if sequences, and so packed rows, differ in length."""
    eval_tokens: int = 1
    """Length of the longest held-out sequence, padding included."""
    ranks: int = 1
    """Processes that share each step, on a device each."""

    def with_memory(self, **levers: Any) -> Workload:
        """Return a copy with other memory levers."""
        return replace(self, memory=self.memory.model_copy(update=levers))

    def to_json(self) -> dict[str, Any]:
        """Return the levers beside the lengths and types, without model and adapter."""
        given = {"device", "compute_dtype", "quantization"}
        given |= {"sequence_tokens", "typical_tokens", "step_sequences"}
        given |= {"varied_rows", "eval_tokens"}
        given |= {"ranks"} if self.ranks > 1 else set()
        return self.memory.model_dump() | {name: getattr(self, name) for name in sorted(given)}

    @property
    def compute_bytes(self) -> int:
        """Bytes of one number of the compute type."""
        return 4 if self.compute_dtype == "float32" else 2

    @property
    def capacity_tokens(self) -> int:
        """Most tokens of a packed micro-batch: as many as the padded rows in its place hold."""
        return self.memory.micro_batch_size * self.sequence_tokens

    @property
    def tokens(self) -> int:
        """Tokens of one micro-batch, padding included."""
        capacity, memory = self.capacity_tokens, self.memory
        return row_tokens(capacity, graphs=memory.graphs) if memory.packing else capacity

    @property
    def row_sequences(self) -> int:
        """Sequences of a packed row of many short ones, of which padding is one: an estimate."""
        # A quarter more than of typical length, and 16 since rows of few sequences differ most:
        # steps of 64 drawn lengths, packed, had up to 17 where 5 were typical.
        held = math.ceil(1.25 * self.capacity_tokens / self.typical_tokens) + 16
        return min(self.step_sequences, held) + 1

    @property
    def keys_per_query(self) -> int:
        """Tokens of a row: the width of the attention mask."""
        return self.tokens if self.memory.packing else self.sequence_tokens


def workload_of(plan: TrainPlan) -> Workload:
    """Return what `plan` puts on the device at one time."""
    rows = plan.dataset.train
    return Workload(
        shape=plan.model.shape,
        adapter=plan.adapter,
        device=plan.device,
        compute_dtype=plan.model.compute_dtype,
        quantization=plan.model.quantization,
        sequence_tokens=padded_length(rows.longest_tokens, plan.max_sequence_length),
        typical_tokens=_mean_tokens(plan.dataset),
        step_sequences=plan.effective_batch_size,
        memory=plan.memory,
        varied_rows=rows.tokens < rows.rows * rows.longest_tokens,
        eval_tokens=padded_length(plan.dataset.dev.longest_tokens, plan.max_sequence_length),
        ranks=plan.ranks,
    )


@dataclass(frozen=True)
class FitRequest:
    """Everything that the choice of settings depends on, without weights and rows."""

    config: TrainingConfig
    environment: EnvironmentReport
    """The machine; a GPU that is only described has no UUID."""
    model_name: str
    shape: ModelShape
    compute_dtype: Literal["bfloat16", "float32"]
    quantization: str
    """The one of the config's that is used."""
    adapter: AdapterSpec
    longest_tokens: int
    """Length of the longest training row, padding included."""
    typical_tokens: int
    """Mean length of a training row."""
    held_out_tokens: int
    """Length of the longest held-out row, padding included."""
    may_think: bool = True
    """The model's chat template writes reasoning."""

    @property
    def host_bytes(self) -> int:
        """Host memory for each rank."""
        return self.environment.host_total_bytes // rank_count(self.config, self.environment)

    @property
    def smallest_workload(self) -> Workload:
        """One sequence at a time: where the candidates of both paths start."""
        return Workload(
            shape=self.shape,
            adapter=self.adapter,
            device=self.environment.device,
            compute_dtype=self.compute_dtype,
            quantization=self.quantization,
            sequence_tokens=self.longest_tokens,
            typical_tokens=self.typical_tokens,
            step_sequences=self.config.effective_batch_size,
            memory=MemorySettings(
                micro_batch_size=1,
                gradient_checkpointing=self.config.gradient_checkpointing != "off",
                loss_chunk_tokens=SMALLEST_PLANNED_LOSS_CHUNK_TOKENS,
                packing=wants_packing(self.config, self.environment.device),
            ),
            varied_rows=self.typical_tokens < self.longest_tokens,
            eval_tokens=self.held_out_tokens,
            ranks=rank_count(self.config, self.environment) * self.config.hosts,
        )


def request_for(
    config: TrainingConfig,
    environment: EnvironmentReport,
    model: ModelSnapshot,
    adapter: AdapterSpec,
    dataset: DatasetManifest,
) -> FitRequest:
    """Return the request of a run."""
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
        typical_tokens=_mean_tokens(dataset),
        held_out_tokens=padded_length(dataset.dev.longest_tokens, limit),
        may_think=template_may_think(model.chat_template_sha256),
    )


def padded_length(longest_tokens: int, limit_tokens: int) -> int:
    """Return the tokens of the longest row as the collator pads it, never 0."""
    length = max(1, min(longest_tokens, limit_tokens))
    return -(-length // PADDING_MULTIPLE_TOKENS) * PADDING_MULTIPLE_TOKENS


def _mean_tokens(dataset: DatasetManifest) -> int:
    """Return the mean length of a training row, rounded up."""
    return -(-dataset.train.tokens // dataset.train.rows)


def wants_packing(config: TrainingConfig, device: str) -> bool:
    """Return whether rows are packed where that fits."""
    # On a GPU each micro-batch costs; on a CPU packing was measured no faster than padding.
    return config.packing == "on" or (config.packing == "auto" and device == "cuda")
