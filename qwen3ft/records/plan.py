"""The plan of one training attempt: settings, memory levers, predicted memory, and reasons.

Sizes are in bytes or, where a name ends in `_gb`, in units of 2**30 bytes.
"""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field, model_validator

from qwen3ft.records.base import Record
from qwen3ft.records.data import DatasetManifest
from qwen3ft.records.model import AdapterSpec, ModelSnapshot


class MemorySettings(Record):
    """Levers that trade time for memory; none of them changes what is learnt.

    A new lever needs a field here, a term in `qwen3ft.planning.footprint`, a step in the search
    (`fused_settings` or `plain_settings`) with its reason, and a rung in `recovery.ladder`.
    """

    kernels: Literal["fused", "plain"] = "plain"
    """'fused': the step of qwen3ft.training.fused; 'plain': transformers and PEFT."""
    micro_batch_size: int = Field(description="Sequences per forward pass.")
    eval_batch_size: int = Field(1, description="Sequences per forward pass of an evaluation.")
    packing: bool = False
    """Sequences one after the other in rows of up to micro_batch_size x the longest row's tokens,
    instead of micro_batch_size padded rows."""
    gradient_checkpointing: bool = Field(description="Recompute activations in the backward.")
    loss_chunk_tokens: int = Field(description="Trained tokens whose logits exist at one time.")
    offload_activations: bool = Field(False, description="Saved activations wait in host memory.")
    offload_optimizer: bool = Field(False, description="The moments stay in host memory.")
    offload_attention: bool = False
    """Fused: attention's output is offloaded too, instead of being recomputed."""
    offloaded_mlp_blocks: int = 0
    """Fused: most blocks whose widest activations wait in host memory."""
    activation_bytes: int = 0
    """Fused: bytes a packed row may take, kept activations and working memory; each row keeps as
    much of its blocks as this holds."""
    chunk_tokens: int = Field(0, description="Fused: tokens with wide intermediates at one time.")
    head_groups: int = Field(1, description="Fused: parts of the gradient of attention.")
    graphs: bool = False
    """Fused: the kernels of a row are launched at once, as CUDA graphs, which hold the memory of
    rows between steps."""


PLAN_FORMAT: Literal[2] = 2
"""Version of a plan as JSON. In version 1, which had no number, the memory levers lay flat."""


class MemoryPart(Record):
    """Term of the predicted peak, with the formula it was computed by."""

    name: str
    bytes: int
    formula: str


class TrainPlan(Record):
    """Plan of one training attempt: everything the worker needs, and a reason for each value."""

    format_version: Literal[2] = PLAN_FORMAT
    attempt: int = Field(ge=1)
    run_id: str = Field("", description="Empty until the plan is given to a run: see `for_run`.")
    run_dir: str = ""
    model: ModelSnapshot
    adapter: AdapterSpec
    dataset: DatasetManifest
    device: Literal["cuda", "cpu"]
    places: tuple[int, ...] = (0,)
    """One for each rank, a process that trains a share of every step: the position of its GPU among
    those that the run holds. On a CPU only their number matters."""
    places_per_host: int | None = Field(None, ge=1)
    """Places that each of several hosts has, those of the run's own host first."""
    max_memory_gb: float
    memory: MemorySettings
    effective_batch_size: int = Field(description="Sequences per optimizer step.")
    max_sequence_length: int
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
    memory_history: bool = False
    """On a GPU: the allocator records the line of code each block comes from."""
    predicted: tuple[MemoryPart, ...]
    reasons: dict[str, str] = Field(description="Reason for each derived value.")
    resume_from: str | None = Field(None, description="Verified checkpoint to continue from.")
    degraded: tuple[str, ...] = ()

    @model_validator(mode="before")
    @classmethod
    def _read_format_1(cls, values: Any) -> Any:
        """Gather the levers of a plan that an older version wrote, so that its run can go on."""
        if not isinstance(values, dict) or "micro_batch_size" not in values:
            return values
        values = dict(values)
        levers = MemorySettings.model_fields.keys() & values.keys()
        memory = {name: values.pop(name) for name in levers}
        accumulation = values.pop("gradient_accumulation_steps")
        effective = memory["micro_batch_size"] * accumulation
        return values | {"memory": memory, "effective_batch_size": effective}

    @property
    def ranks(self) -> int:
        """Processes that share each step."""
        return len(self.places)

    @property
    def hosts(self) -> tuple[int, ...]:
        """Numbers of the hosts that take part; the run's own is 0."""
        return tuple(sorted(set(map(self.host_of, self.places))))

    def host_of(self, place: int) -> int:
        """Return the number of the host that has a place."""
        return place // self.places_per_host if self.places_per_host else 0

    def places_on(self, host: int) -> tuple[int, ...]:
        """Return the places of the ranks on a host."""
        return tuple(place for place in self.places if self.host_of(place) == host)

    def ranks_on(self, host: int) -> tuple[int, ...]:
        """Return the ranks on a host."""
        places = enumerate(self.places)
        return tuple(rank for rank, place in places if self.host_of(place) == host)

    @property
    def worker_kind(self) -> str:
        """Kind of worker that trains: one process on the first GPU, or ranks."""
        return "train" if self.places == (0,) else "ranks"

    @property
    def gradient_accumulation_steps(self) -> int:
        """Micro-batches per optimizer step, of all ranks; with packing, at most."""
        return self.effective_batch_size // self.memory.micro_batch_size

    @property
    def predicted_peak_bytes(self) -> int:
        """Sum of the predicted parts."""
        return sum(part.bytes for part in self.predicted)

    def for_run(
        self, run_id: str, run_dir: str, *, attempt: int, resume_from: str | None
    ) -> TrainPlan:
        """Return the plan as attempt `attempt` of a run, continuing from a checkpoint if given."""
        place = {"run_id": run_id, "run_dir": run_dir}
        return self.model_copy(update={**place, "attempt": attempt, "resume_from": resume_from})

    def setting(self, name: str) -> Any:
        """Return a setting of the plan or a memory lever by its name."""
        return getattr(self.memory if name in MemorySettings.model_fields else self, name)

    def with_settings(self, **values: Any) -> TrainPlan:
        """Return a copy with other settings; memory levers go by their own names.

        Raises:
            ValueError: a name is neither a field of the plan nor a memory lever.
        """
        levers = {name: values.pop(name) for name in MemorySettings.model_fields.keys() & values}
        if unknown := values.keys() - TrainPlan.model_fields.keys():
            raise ValueError(f"A plan has no setting {', '.join(sorted(unknown))}.")
        memory = values.pop("memory", self.memory).model_copy(update=levers)
        return self.model_copy(update={**values, "memory": memory})
