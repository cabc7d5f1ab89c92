"""Predict the memory of training from the model's shape, part by part.

Every part carries its formula, and the total never falls when the micro-batch, the sequence, the
loss chunk or the rank grows. It is meant to err on the large side.

The formulas are those of transformers' Qwen3 with SDPA attention under a padding mask, PEFT's fp32
adapters on bitsandbytes' 4-bit layers, autocast where the model computes in bf16, and a loss whose
chunks are recomputed in backward. What autograd keeps per token of one decoder layer (c: bytes of
the compute type; H, I: hidden and MLP size; Q, K: features of all query / key-value heads;
S: tokens per row, of a packed row all of them; r: rank; h: query heads):

    2 RMSNorms         2 x (4 + c) H      the input in fp32, and the output as adapters' input
    q_norm, k_norm     4 Q + 4 K          their inputs in fp32
    attention          4 c Q + 4 h + c S  q, repeated k and v, output; log-sum-exp; additive mask
    SwiGLU             4 c I              gate, silu(gate), up, and their product
    7 adapters         7 c r              A x   (with dropout also its outputs: 3 H + Q + 2 H + I)

Packed rows have one mask of S x S bytes for all layers beside it, made from two more of its size.

`tests/planning/test_footprint.py` holds this against what autograd really saves, and against peaks
measured on an H100 with the 4B shape, from 3.3 to 26 GB: tensors lay within -1 and +6 % of them.
Not covered: the moment of loading, other programs on the GPU, and the inference test.
"""

from __future__ import annotations

from qwen3ft.machine.gpus import CUDA_CONTEXT_BYTES
from qwen3ft.planning.fused_footprint import fixed_parts, row_parts
from qwen3ft.planning.fused_sizes import FusedSizes
from qwen3ft.planning.packing import row_tokens
from qwen3ft.planning.workload import Workload
from qwen3ft.records.plan import MemoryPart
from qwen3ft.units import GIB, MIB, gb, size_text

CPU_PROCESS_BYTES = int(0.9 * GIB)
"""Resident memory of a process that has imported torch, transformers, PEFT and datasets."""

NCCL_BYTES = (614 - 51) * MIB
"""GPU memory of NCCL's communicator and kernels with `training.ranks.NCCL_SETTINGS`: 614 MiB on
each of two H200, 51 of them within the 0.8 GiB that a process was then taken to need."""

PLAIN_SLACK = {"cuda": (int(0.2 * GIB), 0.07), "cpu": (0, 0.25)}
"""Memory the allocator holds beyond what is in use: bytes, and a share of what comes and goes."""


def predict_memory(work: Workload) -> tuple[MemoryPart, ...]:
    """Return the parts of the predicted peak, in bytes; their sum is the prediction.

    On CUDA that is the memory NVML shows for the process, on a CPU its resident memory.
    """
    if work.memory.kernels == "fused":
        return _fused_parts(work)
    saved = _saved_activations(work)
    working = _working_memory(work, saved.bytes)
    slack_bytes, slack_share = PLAIN_SLACK[work.device]
    return (
        *_fixed_parts(work),
        saved,
        *_packed_mask(work),
        working,
        MemoryPart(
            name="allocator slack",
            bytes=slack_bytes + int(slack_share * (saved.bytes + working.bytes)),
            formula=f"{size_text(slack_bytes)} and {slack_share:.0%} of saved activations and "
            "working memory",
        ),
        _process(work),
    )


def total_bytes(parts: tuple[MemoryPart, ...]) -> int:
    """Return the predicted peak in bytes."""
    return sum(part.bytes for part in parts)


def _fused_parts(work: Workload) -> tuple[MemoryPart, ...]:
    """Return the parts where the step is `qwen3ft.training.fused`."""
    sizes = FusedSizes(work)
    own = {part.name: part for part in fixed_parts(sizes)}
    fixed = (own.get(part.name, part) for part in _fixed_parts(work))
    of_rows = row_parts(sizes)
    longest = row_tokens(work.memory.eval_batch_size * work.eval_tokens)
    evaluation = sizes.evaluation_bytes(longest) if longest > work.tokens else 0
    # An evaluation comes after a step, when rows and gradients are gone; slack stays.
    rows = sum(part.bytes for part in of_rows if part.name != "allocator slack")
    gone = rows + own["gradients"].bytes
    beyond = MemoryPart(
        name="evaluation",
        bytes=max(0, evaluation - gone),
        formula=f"what {longest:,} held-out tokens take beyond that",
    )
    return (*fixed, *of_rows, *([beyond] if beyond.bytes else []), _process(work))


def _process(work: Workload) -> MemoryPart:
    return MemoryPart(
        name="process",
        bytes=CUDA_CONTEXT_BYTES if work.device == "cuda" else CPU_PROCESS_BYTES,
        formula="CUDA context and kernels, measured"
        if work.device == "cuda"
        else "interpreter and libraries, measured",
    )


def _fixed_parts(work: Workload) -> tuple[MemoryPart, ...]:
    """Return the parts that do not depend on the batch."""
    shape, c = work.shape, work.compute_bytes
    linear, trained = shape.linear_parameters, work.adapter.trainable_parameters
    plain = shape.total_parameters - linear
    largest = max(out * inp for out, inp in shape.projection_sizes().values())
    # bitsandbytes scales each block of 64 weights by a constant. Double quantisation stores those
    # in 1 byte, and one in fp32 per 256 of them (Dettmers et al. 2023, arXiv:2305.14314).
    blocks = -(-linear // 64)
    if work.quantization.endswith("-double"):
        constants, constants_formula = blocks + 4 * -(-blocks // 256), "1 + 4/256 bytes"
    else:
        constants, constants_formula = 4 * blocks, "4 bytes"
    copies = c if c < 4 else 0  # autocast keeps a copy of the fp32 adapter
    return (
        MemoryPart(name="4-bit weights", bytes=linear // 2, formula=f"{linear:,} x 0.5 bytes"),
        MemoryPart(
            name="quantisation constants",
            bytes=constants,
            formula=f"{constants_formula} per block of 64 weights",
        ),
        MemoryPart(name="embeddings and norms", bytes=plain * c, formula=f"{plain:,} x {c} bytes"),
        MemoryPart(
            name="dequantised layer",
            bytes=largest * c,
            formula=f"largest projection, {largest:,} x {c} bytes",
        ),
        MemoryPart(
            name="adapter",
            bytes=trained * (4 + copies),
            formula=f"{trained:,} x 4 bytes" + (f", and {c} for its cast copy" if copies else ""),
        ),
        MemoryPart(name="gradients", bytes=4 * trained, formula=f"{trained:,} x 4 bytes"),
        MemoryPart(
            name="AdamW state",
            bytes=0 if work.memory.offload_optimizer else 8 * trained,
            formula="in host memory"
            if work.memory.offload_optimizer
            else f"{trained:,} x 2 moments x 4 bytes",
        ),
        *_exchange(work),
    )


def exchange_bytes(work: Workload) -> int:
    """Return the bytes that a rank takes for the sum of gradients (`training.ranks`)."""
    return sum(part.bytes for part in _exchange(work))


def _exchange(work: Workload) -> tuple[MemoryPart, ...]:
    if work.ranks == 1:
        return ()
    buffers = MemoryPart(
        name="gradients of other ranks",
        bytes=8 * work.adapter.trainable_parameters,
        formula=f"{work.adapter.trainable_parameters:,} x 2 buffers x 4 bytes",
    )
    if work.device == "cpu":
        return (buffers,)
    formula = "communicator and kernels, measured on two H200"
    return buffers, MemoryPart(name="NCCL", bytes=NCCL_BYTES, formula=formula)


def layer_bytes_per_token(work: Workload) -> int:
    """Return the bytes autograd keeps per token of one decoder layer (see the module docstring)."""
    shape, adapter, c = work.shape, work.adapter, work.compute_bytes
    hidden, mlp = shape.hidden_size, shape.intermediate_size
    query, key = shape.query_features, shape.key_features
    norms = 2 * (4 + c) * hidden + 4 * query + 4 * key
    attention = 4 * c * query + 4 * shape.num_attention_heads + c * work.keys_per_query
    dropped = c * (5 * hidden + query + mlp) if adapter.dropout else 0
    return norms + attention + 4 * c * mlp + 7 * c * adapter.r + dropped


def _saved_activations(work: Workload) -> MemoryPart:
    """Return the activations that wait for the backward when the loss is computed."""
    c, layers, hidden = work.compute_bytes, work.shape.num_hidden_layers, work.shape.hidden_size
    # The last norm keeps its input in fp32; its output is kept whole and as trained rows.
    top = (4 + 2 * c) * hidden
    if work.memory.offload_activations:
        return MemoryPart(
            name="saved activations",
            bytes=work.tokens * (2 * c * hidden + top),
            formula=f"{work.tokens:,} tokens x two layers' inputs; the rest waits in host memory",
        )
    if work.memory.gradient_checkpointing:
        each, what = c * hidden, "each layer's input"
    else:
        each, what = layer_bytes_per_token(work), "all of each layer"
    return MemoryPart(
        name="saved activations",
        bytes=work.tokens * (layers * each + top),
        formula=f"{work.tokens:,} tokens x ({layers} layers x {each:,} bytes + {top:,}): {what}",
    )


def _packed_mask(work: Workload) -> tuple[MemoryPart, ...]:
    """Return the mask that keeps the sequences of a packed row apart, and what it is made from."""
    if not work.memory.packing:
        return ()
    return (
        MemoryPart(
            name="packed attention mask",
            bytes=3 * work.tokens**2,
            formula=f"{work.tokens:,} x {work.tokens:,} tokens x 3 x 1 byte",
        ),
    )


def _working_memory(work: Workload, saved_bytes: int) -> MemoryPart:
    """Return the largest of a loss chunk, one layer's backward and an evaluation."""
    shape, c = work.shape, work.compute_bytes
    hidden, mlp = shape.hidden_size, shape.intermediate_size
    # Log-softmax output, its gradient, and the logits' gradient; all fp32. On a CPU the product is
    # float64's: the head's copy, and the logits.
    exact = 8 if work.device == "cpu" else 0
    chunk = min(work.memory.loss_chunk_tokens, work.tokens)
    loss = ((12 + exact) * chunk + exact * hidden) * shape.vocab_size
    # Gradients of one of the MLP's wide tensors and of the residual stream: of each further one,
    # what autograd kept is freed first.
    transient = c * (mlp + hidden)
    again = layer_bytes_per_token(work) if work.memory.gradient_checkpointing else 0
    layer = work.tokens * (transient + again)
    eval_tokens = work.memory.eval_batch_size * work.eval_tokens
    forward = eval_tokens * (c * (4 * mlp + 3 * hidden + work.eval_tokens) + 8 * hidden)
    # Logits in the compute type, the same in fp32, and their log-softmax.
    logits = min(work.memory.loss_chunk_tokens, eval_tokens) * (8 + c) * shape.vocab_size
    evaluation = max(0, max(forward, logits) - saved_bytes)
    return MemoryPart(
        name="working memory",
        bytes=max(loss, layer, evaluation),
        formula=f"largest of: loss chunk {size_text(loss, 3)} "
        f"({12 + exact} bytes x tokens x vocabulary), one layer's backward {gb(layer):.3f}, "
        f"evaluation beyond the saved activations {gb(evaluation):.3f}",
    )
