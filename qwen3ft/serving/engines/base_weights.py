"""The 4-bit base model with its weights written out, for programs that know no bitsandbytes.

The values are those that training and test computed with, not those of the model before it was
quantised: an adapter has learnt to stand on the former.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from qwen3ft.disk.files import read_foreign_json, require_disk, write_json_atomic
from qwen3ft.model.saved_adapter import GENERATION_FILE, TOKENIZER_FILES, shape_of
from qwen3ft.model.source_folder import weight_files
from qwen3ft.serving.merge import BYTES_PER_WEIGHT, SHARD_BYTES

if TYPE_CHECKING:
    import torch

_STATE = ("absmax", "quant_map", "nested_absmax", "nested_quant_map", "quant_state")


def write_base_weights(snapshot: Path, target: Path, device: Literal["cuda", "cpu"]) -> None:
    """Write a 4-bit snapshot as an ordinary model into the new folder `target`.

    For a GPU that is in bfloat16, as the test computed there. Without one it computed in fp32, and
    float16 is closer to that: 11 significant bits instead of 8.

    Raises:
        EnvironmentNotReadyError: too little free disk.
    """
    from safetensors.torch import save_file

    dtype = "bfloat16" if device == "cuda" else "float16"
    room_bytes = BYTES_PER_WEIGHT * shape_of(snapshot).total_parameters
    require_disk(target, room_bytes, "The base model in 16 bits", "The disk is too full.")
    target.mkdir()
    places: dict[str, str] = {}
    for number, tensors in enumerate(_shards(snapshot, dtype), start=1):
        name = f"model-{number:05d}.safetensors"
        save_file(tensors, target / name, metadata={"format": "pt"})
        places |= dict.fromkeys(tensors, name)
    index = {"metadata": {"total_size": room_bytes}, "weight_map": places}
    write_json_atomic(target / "model.safetensors.index.json", index)
    settings = {**read_foreign_json(snapshot / "config.json"), "dtype": dtype}
    del settings["quantization_config"]
    write_json_atomic(target / "config.json", settings)
    for source in (snapshot / name for name in (*TOKENIZER_FILES, GENERATION_FILE)):
        if source.is_file():
            shutil.copyfile(source, target / source.name)


def _shards(snapshot: Path, dtype: str) -> Iterator[dict[str, torch.Tensor]]:
    shard: dict[str, torch.Tensor] = {}
    size_bytes = 0
    for name, tensor in _weights(snapshot, dtype):
        if shard and size_bytes + tensor.nbytes > SHARD_BYTES:
            yield shard
            shard, size_bytes = {}, 0
        shard[name] = tensor
        size_bytes += tensor.nbytes
    yield shard


def _weights(snapshot: Path, dtype: str) -> Iterator[tuple[str, torch.Tensor]]:
    """Yield each weight of the model."""
    import torch
    from bitsandbytes.functional import QuantState, dequantize_4bit
    from safetensors import safe_open

    with ExitStack() as stack:
        opened = [
            stack.enter_context(safe_open(path, framework="pt")) for path in weight_files(snapshot)
        ]
        files: dict[str, Any] = {name: file for file in opened for name in file.keys()}  # noqa: SIM118
        states = {name for name in files if _weight_of(name) is not None}
        for name in sorted(files.keys() - states):
            tensor: torch.Tensor = files[name].get_tensor(name)
            of_tensor = {
                state: files[state].get_tensor(state)
                for state in states
                if _weight_of(state) == name
            }
            if of_tensor:
                state = QuantState.from_dict(of_tensor, torch.device("cpu"))
                tensor = dequantize_4bit(tensor, state)
            yield name, tensor.to(getattr(torch, dtype)).contiguous()


def _weight_of(name: str) -> str | None:
    """Return the weight that a tensor of bitsandbytes belongs to; None if it is a weight."""
    weight, found, state = name.rpartition(".weight.")
    is_state = bool(found) and state.partition(".")[0] in _STATE
    return f"{weight}.weight" if is_state else None
