"""The fast path of training: a packed Qwen3 step whose forward and backward are written out.

The plan (`qwen3ft.planning.fused_search`) decides whether it is taken and how; transformers and
PEFT are its plain twin, and the model, its adapters and their files are theirs on both paths.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from qwen3ft.records.plan import TrainPlan
    from qwen3ft.training.fused.step import FusedStep


def fused_step(model: Any, plan: TrainPlan) -> FusedStep:
    """The step of `plan` over `model`, a PEFT model; with Triton's kernels on a GPU.

    Raises:
        ImportError: on a GPU, Triton is missing.
    """
    from qwen3ft.planning.fused_footprint import FusedSizes
    from qwen3ft.planning.workload import workload_of
    from qwen3ft.training.fused.step import FusedStep

    ops: Any
    if plan.device == "cuda":
        from qwen3ft.training.fused import kernels as ops
    else:
        from qwen3ft.training.fused import reference as ops
    sizes = FusedSizes(workload_of(plan))
    return FusedStep(
        model,
        ops,
        lambda tokens: sizes.levels(tokens, plan.memory.activation_bytes),
        loss_chunk_tokens=plan.memory.loss_chunk_tokens,
        chunk_tokens=plan.memory.chunk_tokens,
        head_groups=plan.memory.head_groups,
        offload=plan.memory.offload_activations,
    )
