"""The program that writes the server's answers."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Literal

from qwen3ft.errors import FinetuneError
from qwen3ft.machine.gpus import visible_gpus
from qwen3ft.model.saved_adapter import find_base, open_adapter, shape_of
from qwen3ft.records.serving import EngineName, ServeRequest
from qwen3ft.server.engines import Engine
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


class EngineMaker:
    """Makes engines for adapters, each with the program that is chosen for its base.

    Args:
        wanted: The engine that is named, or "auto".
        request: Device, budget and extent; its engine and adapter do not count.
        announce: Told which engine it is, and why.
    """

    def __init__(
        self,
        wanted: EngineName | Literal["auto"],
        request: ServeRequest,
        announce: Callable[[str], None],
    ) -> None:
        self._wanted, self._request, self._announce = wanted, request, announce
        self._last: EngineName | None = None
        self._has_fallen_back = False

    def __call__(self, folder: Path) -> Engine:
        """Return an engine, not started, for the base of the adapter in a folder."""
        request = self._request.model_copy(update={"adapter": str(folder)})
        self._last, why = (
            ("own", "which tested the adapter")
            if self._has_fallen_back
            else choose_engine(self._wanted, request)
        )
        self._announce(f"Engine: {self._last}, {why}.")
        return Engine(request.model_copy(update={"engine": self._last}))

    def fall_back(self, error: FinetuneError) -> bool:
        """Make the product's own engines from now on, after `error` of one that nobody named.

        Returns:
            False if it was named, or was the product's own.
        """
        if self._wanted != "auto" or self._last in (None, "own"):
            return False
        self._announce(f"{self._last} is not used: {error.what} {error.why}")
        self._has_fallen_back = True
        return True


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
    if (free_bytes := visible_gpus()[0].free_bytes) < memory.budget_bytes:
        return "own", (
            f"since vLLM takes {size_text(memory.budget_bytes)} from the start, "
            f"and {size_text(free_bytes)} are free on the GPU"
        )
    return "vllm", f"since {program} is installed, and the model fits the GPU in 16 bits"
