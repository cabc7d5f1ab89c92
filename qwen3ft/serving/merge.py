"""Merge an adapter into its base model's own weights, tensor by tensor, in bfloat16.

W' = W + scale * B A, with scale = alpha / r, or alpha / sqrt(r) for rsLoRA (Kalajdzievski 2023,
arXiv:2312.03732). Sums are in fp32 and rounded once.

It runs on the CPU and needs memory for one shard and one tensor; PEFT's own merge holds the whole
model. Adapters with more than plain LoRA (DoRA, biases, whole modules, ranks by layer) are refused.
"""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qwen3ft.errors import SaveError
from qwen3ft.files import write_json_atomic
from qwen3ft.model.saved_adapter import (
    ADAPTER_CONFIG_FILE,
    ADAPTER_FILE,
    TOKENIZER_FILES,
    Tensor,
    read_header,
)
from qwen3ft.units import GIB

if TYPE_CHECKING:
    import torch

SHARD_BYTES = GIB
"""Largest file of the merged model, and so about the memory that merging takes."""

BYTES_PER_WEIGHT = 2

_PREFIX = "base_model.model."
_DOWN, _UP = ".lora_A.weight", ".lora_B.weight"
_PLAIN_LORA = {
    "peft_type": "LORA",
    "bias": "none",
    "use_dora": False,
    "fan_in_fan_out": False,
    "modules_to_save": None,
    "rank_pattern": {},
    "alpha_pattern": {},
}

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
        adapter: A saved adapter, verified by the caller.
        target: Folder for transformers, vLLM and others to load.
        shard_bytes: Largest file, unless a single tensor is larger.
        progress: Called with the number of tensors written.

    Returns:
        The number of tensors written.

    Raises:
        SaveError: the adapter is not plain LoRA, or does not belong to this base model.
    """
    scale = read_scale(adapter)
    pairs = _read_pairs(adapter / ADAPTER_FILE)
    located = [
        (path, tensor)
        for path in sorted(base.glob("*.safetensors"))
        for tensor in read_header(path)
    ]
    _check_pairs(pairs, {tensor.name: tensor for _, tensor in located}, adapter)
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
    _write_settings(base, adapter, target)
    return done


def read_scale(adapter: Path) -> float:
    """Return the factor of the product of the adapter's matrices.

    Raises:
        SaveError: the adapter is not plain LoRA.
    """
    settings = json.loads((adapter / ADAPTER_CONFIG_FILE).read_text(encoding="utf-8"))
    other = {
        name: settings[name]
        for name, plain in _PLAIN_LORA.items()
        if settings.get(name, plain) not in (plain, None)
    }
    if other:
        raise SaveError(
            f"The adapter in {adapter} cannot be merged: it has {other}.",
            why="Only plain LoRA can be merged.",
            next_command=f"qwen3ft chat --adapter {adapter}",
            settings=other,
        )
    rank = settings["r"]
    return float(settings["lora_alpha"] / (math.sqrt(rank) if settings.get("use_rslora") else rank))


def _read_pairs(path: Path) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
    """Read {name of the base's weight: (A, B)}, of shapes (r, in) and (out, r), in fp32."""
    from safetensors.torch import load_file

    tensors = load_file(path)
    # pops every pair: a tensor that is left over would be missing from the merged model
    pairs = {}
    for name in sorted(tensors):
        if not name.endswith(_DOWN):
            continue
        module = name.removesuffix(_DOWN)
        up = tensors.pop(module + _UP, None)
        if up is not None:
            pairs[f"{module.removeprefix(_PREFIX)}.weight"] = (
                tensors.pop(name).float(),
                up.float(),
            )
    if tensors or not pairs:
        raise _no_counterpart(path, sorted(tensors))
    return pairs


def _check_pairs(
    pairs: Mapping[str, tuple[torch.Tensor, torch.Tensor]],
    base: Mapping[str, Tensor],
    adapter: Path,
) -> None:
    """Raise SaveError unless every product has the shape of a weight of the base."""
    wrong = [
        name
        for name, (down, up) in pairs.items()
        if name not in base or base[name].shape != (up.shape[0], down.shape[1])
    ]
    if wrong:
        raise _no_counterpart(adapter, wrong)


def _no_counterpart(path: Path, names: Sequence[str]) -> SaveError:
    first = f", the first is {names[0]}" if names else ""
    return SaveError(
        f"The adapter in {path} does not fit its base model: {len(names)} tensor(s) have no "
        f"counterpart{first}.",
        why="It was trained on a model of another architecture or with other target modules.",
        next_command="qwen3ft history",
        tensors=list(names[:20]),
    )


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


def _write_settings(base: Path, adapter: Path, target: Path) -> None:
    """Write config.json with the new dtype, generation settings, and the adapter's tokenizer."""
    settings: dict[str, Any] = json.loads((base / "config.json").read_text(encoding="utf-8"))
    settings.pop("torch_dtype", None)  # its name before transformers 5
    write_json_atomic(target / "config.json", {**settings, "dtype": "bfloat16"})
    copied = [base / "generation_config.json", *(adapter / name for name in TOKENIZER_FILES)]
    for source in copied:
        if source.is_file():
            shutil.copyfile(source, target / source.name)
