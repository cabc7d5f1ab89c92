"""What passes between stages and between processes: small frozen records that are JSON.

They hold paths, hashes and numbers, never a live model, tokenizer or dataset. Sizes are in bytes,
or,
where the name ends in `_gb`, in units of 2**30 bytes; times are UTC.
"""

from __future__ import annotations

from datetime import UTC, datetime
from typing import Any, Literal

from pydantic import Field

from qwen3ft.records.base import Record
from qwen3ft.records.data import DatasetManifest

GIB = 2**30
"""Bytes in one GB as this project counts it."""

NOTHING_NEW = "NothingNew"
"""Name of the completed state of a run that found nothing to train on."""

PROJECTIONS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
"""The linear layers of a Qwen3 block; all seven get an adapter."""


# --- memory and metrics ---


class MemoryStatus(Record):
    """Memory of the device that trains: the GPU's, or this process's resident memory on a CPU."""

    allocated_gb: float = Field(description="In use by tensors (CPU: resident set).")
    cached_gb: float = Field(description="Held by the allocator (CPU: same as allocated).")
    total_gb: float = Field(description="The budget, or the device's total if that is smaller.")
    available_gb: float = Field(description="What is left of total_gb and free on the device.")
    is_safe: bool = Field(description="Whether use is below 90 % of total_gb.")
    beside_gb: float = Field(
        0.0, description="Of the process but not of the allocator: CUDA context, libraries' own."
    )


class TrainingMetrics(Record):
    """One line of metrics.jsonl: what one optimizer step (or one evaluation) measured."""

    epoch: float
    step: int = Field(description="Optimizer steps done since the start of the run.")
    loss: float | None = Field(None, description="Mean negative log-likelihood per trained token.")
    learning_rate: float
    memory_usage: MemoryStatus
    timestamp: datetime = Field(default_factory=lambda: datetime.now(UTC))
    grad_norm: float | None = None
    tokens_per_second: float | None = Field(None, description="Real tokens; padding not counted.")
    held_out_loss: float | None = Field(None, description="Set on evaluation lines only.")


# --- one record per stage ---


class GpuInfo(Record):
    """One CUDA device as NVML reports it."""

    index: int
    name: str
    uuid: str
    total_bytes: int
    free_bytes: int
    driver_version: str
    compute_capability: str | None = None


class EnvironmentReport(Record):
    """What this machine is and has free; free amounts are those of the moment."""

    python_version: str
    python_executable: str
    platform: str
    versions: dict[str, str]
    cpu_count: int
    host_total_bytes: int
    host_free_bytes: int
    disk_free_bytes: int
    gpus: tuple[GpuInfo, ...] = ()

    @property
    def device(self) -> Literal["cuda", "cpu"]:
        """Where workers train."""
        return "cuda" if self.gpus else "cpu"


class ModelShape(Record):
    """The numbers of a Qwen3 config.json that sizes are computed from."""

    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    vocab_size: int
    tie_word_embeddings: bool
    max_position_embeddings: int

    def projection_sizes(self) -> dict[str, tuple[int, int]]:
        """(output, input) features of each of the seven projections of one layer."""
        query = self.num_attention_heads * self.head_dim
        key_value = self.num_key_value_heads * self.head_dim
        return {
            "q_proj": (query, self.hidden_size),
            "k_proj": (key_value, self.hidden_size),
            "v_proj": (key_value, self.hidden_size),
            "o_proj": (self.hidden_size, query),
            "gate_proj": (self.intermediate_size, self.hidden_size),
            "up_proj": (self.intermediate_size, self.hidden_size),
            "down_proj": (self.hidden_size, self.intermediate_size),
        }

    @property
    def linear_parameters(self) -> int:
        """Weights of all projections of all layers (those that are quantised)."""
        per_layer = sum(out * inp for out, inp in self.projection_sizes().values())
        return per_layer * self.num_hidden_layers

    @property
    def embedding_parameters(self) -> int:
        """Weights of the embedding and, if it is separate, the output head."""
        return self.vocab_size * self.hidden_size * (1 if self.tie_word_embeddings else 2)

    @property
    def total_parameters(self) -> int:
        """All weights, norms included."""
        per_layer = 2 * self.hidden_size + 2 * self.head_dim
        norms = per_layer * self.num_hidden_layers + self.hidden_size
        return self.linear_parameters + self.embedding_parameters + norms


class ModelSource(Record):
    """Where a model comes from, pinned: what makes two requests for it the same."""

    model_name: str
    revision: str = Field(description="Hub commit, or sha256 over a local folder's files.")
    local_path: str | None = Field(None, description="The folder, for a local model.")


class ModelSnapshot(Record):
    """A model quantised once and kept on disk; the manifest in its folder lists every file."""

    source: ModelSource
    path: str = Field(description="Folder with the 4-bit safetensors, config and tokenizer.")
    manifest_sha256: str
    quantization: str = Field(description="Which of config.quantization was used.")
    compute_dtype: Literal["bfloat16", "float32"]
    shape: ModelShape
    size_bytes: int
    chat_template_sha256: str
    degraded: tuple[str, ...] = ()


class AdapterSpec(Record):
    """The adapter to train, counted from the model's shape."""

    r: int
    alpha: int
    dropout: float
    target_modules: tuple[str, ...]
    trainable_parameters: int
    total_parameters: int


class MemoryPart(Record):
    """One term of the predicted peak."""

    name: str
    bytes: int
    formula: str


class TrainPlan(Record):
    """One training attempt, fully resolved. Everything the worker needs, and why it is so."""

    attempt: int = Field(ge=1)
    run_id: str = Field("", description="Empty until the plan is given to a run: see `for_run`.")
    run_dir: str = ""
    model: ModelSnapshot
    adapter: AdapterSpec
    dataset: DatasetManifest
    device: Literal["cuda", "cpu"]
    max_memory_gb: float
    kernels: Literal["fused", "plain"] = Field(
        "plain",
        description="'fused': the step of qwen3ft.training.fused; 'plain': transformers and PEFT.",
    )
    micro_batch_size: int
    gradient_accumulation_steps: int
    eval_batch_size: int
    max_sequence_length: int
    gradient_checkpointing: bool
    loss_chunk_tokens: int = Field(description="Trained tokens whose logits exist at one time.")
    offload_activations: bool = False
    offload_attention: bool = Field(
        False, description="Fused: also attention's output, which is not computed again then."
    )
    offloaded_mlp_blocks: int = Field(
        0, description="Fused: most blocks whose widest activations wait in host memory."
    )
    activation_bytes: int = Field(
        0,
        description="Fused: what a packed row may take, kept activations and working memory; each "
        "row keeps as much of its blocks as this holds.",
    )
    chunk_tokens: int = Field(
        0, description="Fused: tokens whose wide intermediates exist at one time."
    )
    offload_optimizer: bool = Field(
        False, description="Whether the optimizer's moments stay in host memory."
    )
    head_groups: int = Field(
        1, description="Fused: in how many parts the gradient of attention is computed."
    )
    packing: bool = Field(
        False,
        description="Sequences one after the other in rows of up to micro_batch_size x the longest "
        "row's tokens, instead of micro_batch_size padded rows.",
    )
    learning_rate: float
    lr_scheduler: str
    warmup_steps: int
    total_steps: int = Field(description="Steps of the whole schedule (the upper bound).")
    num_epochs: int
    weight_decay: float
    max_grad_norm: float
    evaluate_every_steps: int
    early_stopping_patience: int
    keep_checkpoints: int
    seed: int
    stall_seconds: float
    memory_history: bool = Field(
        False, description="On a GPU: the allocator notes which line of code each block is from."
    )
    predicted: tuple[MemoryPart, ...]
    reasons: dict[str, str] = Field(description="Derived value: why it is what it is.")
    resume_from: str | None = Field(None, description="Verified checkpoint to continue from.")
    degraded: tuple[str, ...] = ()

    @property
    def effective_batch_size(self) -> int:
        """Sequences per optimizer step."""
        return self.micro_batch_size * self.gradient_accumulation_steps

    @property
    def predicted_peak_bytes(self) -> int:
        """Sum of the predicted parts."""
        return sum(part.bytes for part in self.predicted)

    def for_run(
        self, run_id: str, run_dir: str, *, attempt: int, resume_from: str | None
    ) -> TrainPlan:
        """The same plan as attempt `attempt` of a run, continuing from a checkpoint if given."""
        place = {"run_id": run_id, "run_dir": run_dir}
        return self.model_copy(update={**place, "attempt": attempt, "resume_from": resume_from})


class Failure(Record):
    """Why an attempt ended: an error of `qwen3ft.errors` as a value."""

    kind: str
    what: str
    why: str = ""
    next_command: str = ""
    facts: dict[str, Any] = Field(default_factory=dict)
    log_tail: str = ""


class AttemptOutcome(Record):
    """A completed attempt: which checkpoint is best, and what was measured."""

    attempt: int
    attempt_dir: str
    best_checkpoint: str
    best_step: int
    best_held_out_loss: float
    first_held_out_loss: float
    last_step: int
    epochs: float
    final_loss: float | None
    stopped_early: bool
    peak_memory_gb: float = Field(description="Highest of any attempt process, as NVML or RSS.")
    peak_allocated_gb: float
    peak_reserved_gb: float
    tokens_per_second: float
    seconds: float


class SavedAdapter(Record):
    """An adapter on disk, read back and verified."""

    path: str
    sha256: str = Field(description="Of adapter_model.safetensors.")
    size_bytes: int
    model_name: str
    degraded: tuple[str, ...] = ()
    mlflow_run_id: str | None = None
    registered_model: str | None = None
    version: str | None = Field(None, description="Registry version; None while tracking is down.")
