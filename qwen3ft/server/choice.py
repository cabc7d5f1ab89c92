"""The program that writes the server's answers."""

from __future__ import annotations

from typing import Literal

from qwen3ft.records.serving import EngineName
from qwen3ft.serving.engines.vllm import find_vllm
from qwen3ft.serving.gguf_files import missing_gguf_packages


def choose_engine(
    wanted: EngineName | Literal["auto"], device: Literal["cuda", "cpu"]
) -> tuple[EngineName, str]:
    """Return the engine, and why that one."""
    if wanted != "auto":
        return wanted, "as --engine says"
    if (program := find_vllm()) is not None:
        return "vllm", f"since {program} is installed"
    if missing_gguf_packages():
        return "own", "since neither vLLM nor the packages for GGUF are installed"
    if device == "cuda":
        return "own", "since vLLM is not installed, and llama.cpp would leave the GPU idle"
    return "llama.cpp", "since its packages are installed, and neither vLLM nor a GPU is there"
