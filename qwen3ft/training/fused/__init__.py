"""The fused path of training: a packed Qwen3 step with hand-written forward and backward.

The plan (`qwen3ft.planning.fused_search`) chooses between it and the plain path, which is that of
transformers and PEFT. The model, its adapters and their files are theirs on both paths.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from qwen3ft.records.plan import TrainPlan
    from qwen3ft.training.fused.ops import ElementWise
    from qwen3ft.training.fused.step import FusedStep


def element_wise(device: str) -> ElementWise:
    """Return Triton's kernels for 'cuda', plain torch for 'cpu'.

    Raises:
        ImportError: on a GPU, Triton is missing.
    """
    if device == "cuda":
        from qwen3ft.training.fused.kernels import TritonOps

        return TritonOps()
    from qwen3ft.training.fused.reference import ReferenceOps

    return ReferenceOps()


def fused_step(model: Any, plan: TrainPlan) -> FusedStep:
    """Return the fused step of `plan` over `model`, a PEFT model.

    Raises:
        ImportError: on a GPU, Triton is missing.
    """
    from qwen3ft.planning.fused_sizes import FusedSizes
    from qwen3ft.planning.workload import workload_of
    from qwen3ft.training.fused.step import FusedStep

    sizes = FusedSizes(workload_of(plan))
    return FusedStep(
        model,
        element_wise(plan.device),
        lambda tokens: sizes.levels(tokens, plan.memory.activation_bytes),
        loss_chunk_tokens=plan.memory.loss_chunk_tokens,
        chunk_tokens=plan.memory.chunk_tokens,
        head_groups=plan.memory.head_groups,
        offload=plan.memory.offload_activations,
        graph_tokens=sizes.work.tokens if plan.memory.graphs else 0,
    )
