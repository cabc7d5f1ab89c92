"""The program that writes the server's answers."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from qwen3ft.model.saved_adapter import find_base, open_adapter, shape_of
from qwen3ft.records.serving import EngineName, ServeRequest
from qwen3ft.serving.engines.places import choose_context
from qwen3ft.serving.engines.vllm import (
    LEAST_VERSION,
    VllmMemory,
    find_vllm,
    is_new_enough,
    version_of,
)
from qwen3ft.serving.prompting import trained_prompting
from qwen3ft.units import size_text


def choose_engine(
    wanted: EngineName | Literal["auto"], request: ServeRequest
) -> tuple[EngineName, str]:
    """Return the engine, and why that one.

    Unless one is named it is the engine that tested the adapter, or vLLM on a GPU where it fits.

    Args:
        wanted: The engine that is named, or "auto".
        request: Adapter, device and budget; its engine does not count.

    Raises:
        ModelNotFoundError, SaveError, ModelUnavailableError: as `find_base`.
    """
    if wanted != "auto":
        return wanted, "as --engine says"
    if request.device == "cpu":
        return "own", "which tested the adapter, since there is no GPU"
    if (program := find_vllm()) is None:
        return "own", "which tested the adapter, since vLLM is not installed"
    if not is_new_enough(version := version_of(program)):
        return "own", f"since {program} is vLLM {version}, and {LEAST_VERSION} is needed"
    opened = open_adapter(Path(request.adapter))
    shape = shape_of(Path(find_base(opened)))
    context_tokens = choose_context(request, trained_prompting(opened.provenance), shape)
    memory = VllmMemory.of(request, shape, context_tokens)
    needed_bytes = memory.fixed_bytes + memory.answer_bytes
    if needed_bytes > memory.budget_bytes:
        return "own", (
            f"since vLLM would need {size_text(needed_bytes)}, "
            f"and the budget is {size_text(memory.budget_bytes)}"
        )
    return "vllm", f"since {program} is installed, and the model fits the GPU in 16 bits"
