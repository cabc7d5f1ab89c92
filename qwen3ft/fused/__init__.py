"""The fast path of training: a packed Qwen3 step whose forward and backward are written out.

The plan (`qwen3ft.fused_fit`) decides whether it is taken and how; transformers and PEFT are its
plain twin, and the model, its adapters and their files are theirs on both paths.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from qwen3ft.fused.step import FusedStep
    from qwen3ft.records import TrainPlan


def fused_step(model: Any, plan: TrainPlan) -> FusedStep:
    """The step of `plan` over `model`, a PEFT model; with Triton's kernels on a GPU.

    Raises:
        ImportError: on a GPU, Triton is missing.
    """
    from qwen3ft.footprint import fused_sizes
    from qwen3ft.fused.step import FusedStep
    from qwen3ft.plan import workload_of

    ops: Any
    if plan.device == "cuda":
        from qwen3ft.fused import kernels as ops
    else:
        from qwen3ft.fused import reference as ops
    sizes = fused_sizes(plan.model.shape, plan.adapter, workload_of(plan))
    return FusedStep(
        model,
        ops,
        lambda tokens: sizes.levels(tokens, plan.activation_bytes),
        loss_chunk_tokens=plan.loss_chunk_tokens,
        chunk_tokens=plan.chunk_tokens,
        head_groups=plan.head_groups,
        offload=plan.offload_activations,
    )
