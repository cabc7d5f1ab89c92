"""Run a decoder within a memory budget: what keeps it from running, its room, its rungs.

Out of memory, it is made again smaller, down to the last of `RUNGS`. Whatever else goes wrong on a
GPU is raised: after such an error the process cannot be trusted, and a new one answers without the
decoder.
"""

from __future__ import annotations

import gc
from collections.abc import Callable
from dataclasses import dataclass, replace
from importlib.util import find_spec
from subprocess import CalledProcessError
from typing import Any, TypeVar

import torch

from qwen3ft.errors import EnvironmentNotReadyError, OutOfMemoryError
from qwen3ft.jobs.failures import translate
from qwen3ft.logs import get_logger
from qwen3ft.machine.gpus import CUDA_CONTEXT_BYTES
from qwen3ft.machine.process_memory import resident_bytes
from qwen3ft.planning.decoder_sizes import SLOT_CHOICES, AnswerLoad, DecoderSizes, choose_sizes
from qwen3ft.units import GIB, size_text

logger = get_logger("inference")

CPU_CHUNK_TOKENS = 64
"""Rows of each product on a CPU, where padding costs as much as text."""

_STATIC_ROPE = ("default", "linear", "yarn", "llama3")  # rotations that no length changes

_DONE, _RAN_OUT, _FAILED = range(3)

_Result = TypeVar("_Result")


@dataclass(frozen=True)
class DecoderRung:
    """Limits of a decoder; the next rung's are narrower in one way at least.

    Attributes:
        most_slots: Most answers at a time.
        resident: Leave to keep blocks dequantised.
        room_share: Share of the room that the decoder may plan with; the pages get what is left
            of it.
    """

    most_slots: int
    resident: bool
    room_share: float


RUNGS = (
    DecoderRung(SLOT_CHOICES[-1], True, 1.0),
    DecoderRung(SLOT_CHOICES[-1], False, 0.85),
    DecoderRung(64, False, 0.65),
    DecoderRung(16, False, 0.4),
)
"""The next after running out of memory: no copies in 16 bits, then fewer slots and pages."""


class CannotDecodeError(Exception):
    """The decoder cannot answer here, and transformers can; the message is the reason."""


def find_obstacle(model: Any, device: str, compute_dtype: str, kernels: str) -> str:
    """Return why the decoder cannot answer for `model`; '' if it can.

    Args:
        model: A model of transformers, or a PEFT model over one.
        device: 'cuda' or 'cpu'; on a CPU `kernels` 'fused' asks for the decoder's plain twin.
        compute_dtype: Type of the matrix products.
        kernels: The setting.
    """
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    rope = (getattr(base.config, "rope_parameters", None) or {}).get("rope_type", "default")
    head_dim = base.config.head_dim
    on_gpu = device == "cuda"
    reasons = {
        "kernels=plain": kernels == "plain",
        "no GPU": not on_gpu and kernels != "fused",
        "the GPU has no bfloat16": on_gpu and compute_dtype != "bfloat16",
        "Triton is missing": on_gpu and find_spec("triton") is None,
        f"rotary embeddings of type {rope}": rope not in _STATIC_ROPE,
        f"heads of {head_dim} numbers": head_dim & (head_dim - 1) != 0 or head_dim < 16,
    }
    return next((reason for reason, holds in reasons.items() if holds), "")


def run_within(
    load: AnswerLoad,
    budget_gb: float,
    device: str,
    use: Callable[[DecoderSizes], _Result],
    *,
    resident: bool = True,
    most_slots: int = SLOT_CHOICES[-1],
    highest: Callable[[int], int] = int,
) -> tuple[DecoderSizes, _Result]:
    """Return `use(sizes)` with the largest sizes that fit, and those sizes.

    Args:
        load: Questions and model.
        budget_gb: Memory of the whole process, GB of 2**30 bytes.
        device: 'cuda' or 'cpu'; the model is on it.
        use: Makes a decoder of these sizes and asks it; called again after running out of memory.
        resident: Let blocks stay dequantised, which takes what the budget has left.
        most_slots: Limit of slots.
        highest: Returns the highest of a number over all ranks, which answer with the same sizes.

    Raises:
        CannotDecodeError: not even the last rung fits, or a kernel does not compile here.
    """
    tried: DecoderSizes | None = None
    for rung in RUNGS:
        room_bytes = -highest(-int(rung.room_share * free_room(budget_gb, device)))
        slots = min(most_slots, rung.most_slots)
        sizes = choose_sizes(load, room_bytes, slots, resident=resident and rung.resident)
        if sizes is not None and device == "cpu":
            sizes = replace(sizes, chunk_tokens=CPU_CHUNK_TOKENS)
        if sizes is None or sizes == tried:
            continue
        why, outcome = "", None
        try:
            outcome = _attempt(use, sizes)
        except CannotDecodeError as error:
            why = str(error)
        worst = highest(_FAILED if why else _RAN_OUT if outcome is None else _DONE)
        if worst == _FAILED:
            raise CannotDecodeError(why or "the decoder failed on another rank")
        if outcome is not None and worst == _DONE:
            return sizes, outcome[0]
        tried = sizes
        logger.warning(
            "out of memory with %d slots, %d pages and %d blocks in 16 bits within %s",
            *(sizes.slots, sizes.pages, sizes.resident_blocks, size_text(room_bytes)),
        )
    reason = "memory ran out with every size" if tried else "it does not fit the budget"
    raise CannotDecodeError(f"the decoder: {reason}")


def free_room(budget_gb: float, device: str) -> int:
    """Return the bytes of the budget that nothing takes yet, nor another program."""
    left_bytes = int(budget_gb * GIB) - used_bytes(device)
    if device == "cpu":
        return left_bytes
    return min(left_bytes, torch.cuda.mem_get_info()[0])


def used_bytes(device: str) -> int:
    """Return the memory of this process on the device, without what it only holds in reserve."""
    gc.collect()  # a decoder refers to itself
    if device == "cpu":
        return resident_bytes()
    torch.cuda.empty_cache()
    return CUDA_CONTEXT_BYTES + int(torch.cuda.memory_allocated())


def _attempt(use: Callable[[DecoderSizes], _Result], sizes: DecoderSizes) -> tuple[_Result] | None:
    """Return `use(sizes)` in a tuple, or None if memory ran out.

    In here, the traceback would keep the decoder's tensors alive.
    """
    try:
        return (use(sizes),)
    except _compile_errors() as error:
        raise CannotDecodeError(_described(error)) from None
    except RuntimeError as error:
        # An error within a captured step is followed by that of ending the capture.
        links = [link for link in (error, error.__context__) if link is not None]
        failures = [translate(link, "answers") for link in links]
        if any(isinstance(failure, OutOfMemoryError) for failure in failures):
            return None
        if isinstance(failures[0], EnvironmentNotReadyError):  # no kernel for this GPU
            raise CannotDecodeError(_described(error)) from None
        raise


def _compile_errors() -> tuple[type[Exception], ...]:
    """Return what is raised where a kernel cannot be compiled: by Triton, or by its C compiler."""
    if find_spec("triton") is None:
        return (CalledProcessError,)
    from triton.errors import TritonError

    return TritonError, CalledProcessError


def _described(error: Exception) -> str:
    return f"the decoder failed: {type(error).__name__}: {str(error)[:200]!a}"
