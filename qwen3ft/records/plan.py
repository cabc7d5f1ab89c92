"""What passes between stages and between processes: small frozen records that are JSON.

They hold paths, hashes and numbers, never a live model, tokenizer or dataset. Sizes are in bytes,
or,
where the name ends in `_gb`, in units of 2**30 bytes; times are UTC.
"""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from qwen3ft.records.base import Record
from qwen3ft.records.data import DatasetManifest
from qwen3ft.records.model import AdapterSpec, ModelSnapshot

# --- memory and metrics ---


# --- one record per stage ---


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
