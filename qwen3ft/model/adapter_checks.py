"""Checks of an adapter's settings and weights, before PEFT or torch reads them.

Only what this project writes passes: plain LoRA on the seven projections of every layer, in fp32,
with the rank and scale of its plan. Anything else that PEFT can do (patterns, other modules, other
methods) is refused by its name. No torch is needed.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qwen3ft.disk.files import read_foreign_json
from qwen3ft.disk.manifests import find_damage
from qwen3ft.model.tensor_files import Tensor, find_wild_values, read_header
from qwen3ft.records.model import (
    ATTENTION_PROJECTIONS,
    PROJECTIONS,
    AdapterSpec,
    ModelShape,
    projection_sizes,
)

ADAPTER_FILE = "adapter_model.safetensors"
ADAPTER_CONFIG_FILE = "adapter_config.json"

LARGEST_WEIGHT = 1e4
"""AdamW moves a weight by about the learning rate a step, so trained ones stay below 10. Servers
may hold them in float16, which ends at 65,504."""

_FREE = ("base_model_name_or_path", "revision", "inference_mode", "peft_version")
"""Settings that do not change what is loaded; `qwen3ft.model.saved_adapter` compares the first."""

_FIXED = {
    "peft_type": "LORA",
    "task_type": "CAUSAL_LM",
    "bias": "none",
    "init_lora_weights": True,
    "megatron_core": "megatron.core",  # PEFT's defaults, of no effect without their switches
    "qalora_group_size": 16,
}


class AdapterError(ValueError):
    """An adapter that must not be used; `wild` names the tensors with NaN or absurd values."""

    def __init__(self, reason: str, wild: Sequence[str] = ()) -> None:
        super().__init__(reason)
        self.wild = tuple(wild)


@dataclass(frozen=True)
class AdapterLayout:
    """Number of layers, and (output, input) features of each projection."""

    layers: int
    sizes: dict[str, tuple[int, int]]

    def require_fit(self, shape: ModelShape) -> None:
        """Raise AdapterError unless the adapter is for a model of this shape."""
        if (self.layers, self.sizes) != (shape.num_hidden_layers, shape.projection_sizes()):
            raise AdapterError(
                f"it does not fit its base model: it is for {self.layers} layers with projections "
                f"{self.sizes}, the model has {shape.num_hidden_layers} with "
                f"{shape.projection_sizes()}"
            )


def verify_adapter(folder: Path, spec: AdapterSpec, required: Sequence[str] = ()) -> AdapterLayout:
    """Return the layout of the adapter in `folder`, whose files, settings and values hold.

    Args:
        folder: A saved adapter or a checkpoint.
        spec: The adapter that was trained.
        required: Files that are read besides settings and weights.

    Raises:
        AdapterError: the manifest does not list a file or a file differs from it; or the settings,
            names, shapes, dtypes or values are not those of such an adapter.
    """
    try:
        weights = folder / ADAPTER_FILE
        # Before the hashes: the header says how large the file may be.
        tensors = read_header(weights)
        layout = read_layout(tensors, spec)
        if damage := find_damage(folder, (ADAPTER_FILE, ADAPTER_CONFIG_FILE, *required)):
            raise AdapterError(damage)
        check_settings(read_foreign_json(folder / ADAPTER_CONFIG_FILE), spec)
    except AdapterError:
        raise
    except ValueError as error:
        raise AdapterError(str(error)) from error
    if wild := list(find_wild_values(weights, tensors, LARGEST_WEIGHT)):
        raise AdapterError(
            f"{len(wild)} tensor(s) hold values that are not finite or beyond "
            f"{LARGEST_WEIGHT:,.0f}, the first is {wild[0]}",
            wild,
        )
    return layout


def check_settings(settings: Any, spec: AdapterSpec) -> None:
    """Raise AdapterError unless PEFT's settings are those of `spec`, with all else switched off."""
    if not isinstance(settings, dict):
        raise AdapterError(f"{ADAPTER_CONFIG_FILE} holds no settings")
    targets = settings.get("target_modules")
    # PEFT takes a text for a regular expression and matches every module's name against it.
    if not isinstance(targets, list) or sorted(map(str, targets)) != sorted(spec.target_modules):
        raise AdapterError(f"target_modules is {_short(targets)} instead of the seven projections")
    expected = {
        **_FIXED,
        "r": spec.r,
        "lora_alpha": spec.alpha,
        "lora_dropout": spec.dropout,
    }
    for name in ("peft_type", "r", "lora_alpha"):
        if name not in settings:
            raise AdapterError(f"{ADAPTER_CONFIG_FILE} lacks {name}")
    for name, value in settings.items():
        if name in expected:
            if value != expected[name] or isinstance(value, bool) != isinstance(
                expected[name], bool
            ):
                raise AdapterError(f"{name} is {_short(value)} instead of {expected[name]!r}")
        elif name not in (*_FREE, "target_modules") and value not in (None, False, "", [], {}):
            raise AdapterError(f"{_short(name)} is {_short(value)}, and only plain LoRA is used")


def read_layout(tensors: Sequence[Tensor], spec: AdapterSpec) -> AdapterLayout:
    """Return the layout of an adapter's tensors.

    Raises:
        AdapterError: they are not A and B of every projection of every layer, in fp32, of the rank
            and number of parameters of `spec`.
    """
    found = {tensor.name: tensor for tensor in tensors}
    layers, left = divmod(len(found), 2 * len(PROJECTIONS))
    names = {
        tensor_name(layer, projection, part)
        for layer in range(layers)
        for projection in PROJECTIONS
        for part in "AB"
    }
    if left or not layers or found.keys() != names:
        strange = sorted(found.keys() - names) or ["none at all"]
        raise AdapterError(
            f"its {len(found)} tensors are not A and B of seven projections of every layer; the "
            f"first that is not is {strange[0][:200]!a}"
        )
    if other := next((tensor for tensor in tensors if tensor.dtype != "F32"), None):
        raise AdapterError(f"{other.name} is {other.dtype}; adapters are trained and kept in F32")
    if flat := next((tensor for tensor in tensors if len(tensor.shape) != 2), None):
        raise AdapterError(f"{flat.name} has the shape {flat.shape}, which is no matrix")

    def size(projection: str, part: str) -> int:
        return found[tensor_name(0, projection, part)].shape[0 if part == "B" else 1]

    sizes = projection_sizes(
        size("q_proj", "A"), size("gate_proj", "B"), size("q_proj", "B"), size("k_proj", "B")
    )
    for layer in range(layers):
        for projection, (out, inp) in sizes.items():
            for part, expected in (("A", (spec.r, inp)), ("B", (out, spec.r))):
                tensor = found[tensor_name(layer, projection, part)]
                if tensor.shape != expected:
                    raise AdapterError(
                        f"{tensor.name} has the shape {tensor.shape} instead of {expected}"
                    )
    parameters = sum(math.prod(tensor.shape) for tensor in tensors)
    if parameters != spec.trainable_parameters:
        raise AdapterError(
            f"it has {parameters:,} parameters instead of {spec.trainable_parameters:,}"
        )
    return AdapterLayout(layers, sizes)


def tensor_name(layer: int, projection: str, part: str) -> str:
    """Return PEFT's name of matrix 'A' or 'B' of a projection."""
    block = "self_attn" if projection in ATTENTION_PROJECTIONS else "mlp"
    return f"base_model.model.model.layers.{layer}.{block}.{projection}.lora_{part}.weight"


def _short(value: Any) -> str:
    """Return a foreign value as text that is short and safe to print."""
    if isinstance(value, (list, dict)):
        return f"a {type(value).__name__} of {len(value)}"
    text = ascii(value[:80] if isinstance(value, str) else value)
    return text if len(text) <= 120 else f"{text[:120]}..."
