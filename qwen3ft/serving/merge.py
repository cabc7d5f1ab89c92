"""Merge an adapter into its base model's own weights, tensor by tensor, in bfloat16.

W' = W + alpha / r * B A. Sums are in fp32 and rounded once.

It runs on the CPU and needs memory for one shard and one tensor; PEFT's own merge holds the whole
model. Adapters with more than plain LoRA (DoRA, biases, whole modules, ranks by layer) are refused
when they are opened.
"""

from __future__ import annotations

import math
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qwen3ft.chat.templates import END_TOKEN
from qwen3ft.chat.tokenizer import declared_end, load_tokenizer
from qwen3ft.disk.files import read_foreign_json, write_json_atomic
from qwen3ft.model.adapter_checks import ADAPTER_FILE
from qwen3ft.model.manager import with_end
from qwen3ft.model.request_defaults import write_request_defaults
from qwen3ft.model.saved_adapter import GENERATION_FILE, TOKENIZER_FILES, open_adapter, require_fit
from qwen3ft.model.shapes import read_shape
from qwen3ft.model.source_folder import read_settings, weight_files
from qwen3ft.model.tensor_files import Tensor, read_header
from qwen3ft.units import GIB

if TYPE_CHECKING:
    import torch

SHARD_BYTES = GIB
"""Largest file of the merged model, and so about the memory that merging takes."""

BYTES_PER_WEIGHT = 2

_PREFIX = "base_model.model."
_DOWN, _UP = ".lora_A.weight", ".lora_B.weight"
Located = tuple[Path, Tensor]


def merge_adapter(
    base: Path,
    adapter: Path,
    target: Path,
    *,
    shard_bytes: int = SHARD_BYTES,
    progress: Callable[[int], None] = lambda _: None,
) -> int:
    """Write the merged model into the empty folder `target`, with config and tokenizer.

    Args:
        base: Folder with the unquantised safetensors.
        adapter: A saved adapter.
        target: Folder for transformers, vLLM and others to load.
        shard_bytes: Largest file, unless a single tensor is larger.
        progress: Called with the number of tensors written.

    Returns:
        The number of tensors written.

    Raises:
        SaveError: the adapter is refused, or does not belong to this base model.
    """
    opened = open_adapter(adapter)
    require_fit(opened, read_shape(base))
    scale = opened.spec.alpha / opened.spec.r
    pairs = _read_pairs(adapter / ADAPTER_FILE)
    located = [(path, tensor) for path in weight_files(base) for tensor in read_header(path)]
    shards = list(_shards(located, shard_bytes))
    names = _shard_names(len(shards))
    done = 0
    for name, shard in zip(names, shards, strict=True):
        tensors: dict[str, torch.Tensor] = {}
        for path, tensor in shard:
            tensors[tensor.name] = _merged(path, tensor.name, pairs, scale)
            done += 1
            progress(done)
        _write_shard(tensors, target / name)
    if len(names) > 1:
        _write_index(target, dict(zip(names, shards, strict=True)))
    _write_settings(base, adapter, target, opened.provenance)
    return done


def _read_pairs(path: Path) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
    """Read {name of the base's weight: (A, B)}, of shapes (r, in) and (out, r), in fp32."""
    from safetensors.torch import load_file

    tensors = load_file(path)
    return {
        name.removeprefix(_PREFIX).replace(_DOWN, ".weight"): (
            down,
            tensors[name.replace(_DOWN, _UP)],
        )
        for name, down in tensors.items()
        if name.endswith(_DOWN)
    }


def _shards(located: Sequence[Located], shard_bytes: int) -> Iterator[list[Located]]:
    """Yield the tensors in order, in groups of up to `shard_bytes` as bfloat16."""
    group: list[Located] = []
    size_bytes = 0
    for path, tensor in located:
        tensor_bytes = BYTES_PER_WEIGHT * math.prod(tensor.shape)
        if group and size_bytes + tensor_bytes > shard_bytes:
            yield group
            group, size_bytes = [], 0
        group.append((path, tensor))
        size_bytes += tensor_bytes
    yield group


def _shard_names(count: int) -> list[str]:
    if count == 1:
        return ["model.safetensors"]
    return [f"model-{number:05d}-of-{count:05d}.safetensors" for number in range(1, count + 1)]


def _merged(
    path: Path, name: str, pairs: Mapping[str, tuple[torch.Tensor, torch.Tensor]], scale: float
) -> torch.Tensor:
    """Return one weight of the base in bfloat16, with the adapter added."""
    import torch
    from safetensors import safe_open

    with safe_open(path, framework="pt") as stored:
        weight: torch.Tensor = stored.get_tensor(name)
    if name not in pairs:
        return weight.to(torch.bfloat16)
    down, up = pairs[name]
    # in fp32: bfloat16 has 8 significant bits, so a small update would vanish in the sum
    return torch.addmm(weight.float(), up, down, alpha=scale).to(torch.bfloat16)


def _write_shard(tensors: dict[str, torch.Tensor], path: Path) -> None:
    from safetensors.torch import save_file

    save_file(tensors, path, metadata={"format": "pt"})


def _write_index(target: Path, shards: Mapping[str, Sequence[Located]]) -> None:
    """Write the index of tensors by shard, as transformers does."""
    places = {tensor.name: name for name, shard in shards.items() for _, tensor in shard}
    weights = sum(math.prod(tensor.shape) for shard in shards.values() for _, tensor in shard)
    index = {"metadata": {"total_size": BYTES_PER_WEIGHT * weights}, "weight_map": places}
    write_json_atomic(target / "model.safetensors.index.json", index)


def _write_settings(base: Path, adapter: Path, target: Path, provenance: dict[str, Any]) -> None:
    """Write config.json with the new dtype, the adapter's tokenizer, and requests' defaults.

    All of them declare the trained end token, which is not a base model's own.
    """
    for source in (adapter / name for name in TOKENIZER_FILES):
        if source.is_file():
            shutil.copyfile(source, target / source.name)
    # An adapter saved by an earlier version has no defaults of its own.
    tokens_from = adapter if (adapter / GENERATION_FILE).is_file() else base
    write_request_defaults(target, tokens_from, provenance)
    settings = {**read_settings(base), "dtype": "bfloat16"}
    if any((target / name).is_file() for name in TOKENIZER_FILES):
        settings["eos_token_id"] = _declare_end(target)
    write_json_atomic(target / "config.json", settings)


def _declare_end(target: Path) -> int:
    """Declare the trained end in the settings of the tokenizer and of generation; return its id."""
    end: int = load_tokenizer(target).eos_token_id
    path = target / GENERATION_FILE
    generation = read_foreign_json(path)
    ends = with_end(generation.get("eos_token_id"), end)
    write_json_atomic(path, {**generation, "eos_token_id": ends})
    if declared_end(target) != END_TOKEN:  # an adapter that an older version saved
        path = target / "tokenizer_config.json"
        write_json_atomic(path, {**read_foreign_json(path), "eos_token": END_TOKEN})
    return end
