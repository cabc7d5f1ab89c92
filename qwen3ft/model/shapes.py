"""The dense Qwen3 models and their shapes, from which memory and speed are computed.

The numbers are those of each model's config.json on the hub. Not covered: mixtures of experts,
multimodal models and other families.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

from pydantic import ValidationError

from qwen3ft.config import EMBEDDED_MODEL_NAME, TrainingConfig
from qwen3ft.disk.files import read_foreign_json
from qwen3ft.errors import ConfigError, ModelNotFoundError
from qwen3ft.records.model import PROJECTIONS, AdapterSpec, ModelShape


@dataclass(frozen=True)
class KnownModel:
    """One size of Qwen3."""

    key: str
    """Short name, as on the command line."""
    hub_name: str
    """The model that the key stands for."""
    shape: ModelShape
    variants: tuple[str, ...]
    """Suffixes of the other models of this size on the hub."""

    @property
    def hub_names(self) -> tuple[str, ...]:
        """All models of this size on the hub."""
        name = f"Qwen/Qwen3-{self.key.upper()}"
        return (name, *(f"{name}-{variant}" for variant in self.variants))


def _qwen3(
    key: str,
    hidden: int,
    intermediate: int,
    layers: int,
    heads: int,
    *,
    tied: bool,
    name: str = "",
    positions: int = 40960,
    variants: tuple[str, ...] = ("Base",),
) -> KnownModel:
    shape = ModelShape(
        hidden_size=hidden,
        intermediate_size=intermediate,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=8,
        head_dim=128,
        vocab_size=151936,
        tie_word_embeddings=tied,
        max_position_embeddings=positions,
    )
    return KnownModel(key, f"Qwen/{name or 'Qwen3-' + key.upper()}", shape, variants)


_LONG_POSITIONS = 262144
"""Positions of the models of July 2025, whose names end in 2507."""

_BASE_POSITIONS = 32768

KNOWN_MODELS = (
    _qwen3("0.6b", 1024, 3072, 28, 16, tied=True),
    _qwen3("1.7b", 2048, 6144, 28, 16, tied=True),
    _qwen3(
        *("4b", 2560, 9728, 36, 32),
        tied=True,
        name="Qwen3-4B-Thinking-2507",
        positions=_LONG_POSITIONS,
        variants=("Base", "Instruct-2507", "Thinking-2507"),
    ),
    _qwen3("8b", 4096, 12288, 36, 32, tied=False),
    _qwen3("14b", 5120, 17408, 40, 40, tied=False),
    _qwen3("32b", 5120, 25600, 64, 64, tied=False, variants=()),
)
"""Every dense size, smallest first."""

_LARGEST = {
    "hidden_size": 2**17,
    "intermediate_size": 2**20,
    "num_hidden_layers": 1024,
    "num_attention_heads": 1024,
    "num_key_value_heads": 1024,
    "head_dim": 1024,
    "vocab_size": 2**22,
    "max_position_embeddings": 2**28,
}
"""Far beyond any Qwen3; tensors and lists of these sizes are never made for larger numbers."""

_SIZE = re.compile(r"qwen3-(\d+(?:\.\d+)?b)(?![\w.])(?:-(base|.*2507))?", re.IGNORECASE)


def known_shape(name: str) -> tuple[str, ModelShape] | None:
    """Return (full name, shape) of a known model, by its key or hub name; None if unknown.

    A variant of a known model, such as Qwen/Qwen3-4B-Base, has the shape of its size.
    """
    by_key = {model.key: model for model in KNOWN_MODELS}
    if (model := by_key.get(name.lower())) is not None:
        return model.hub_name, model.shape
    found = _SIZE.search(name)
    if found is None or (model := by_key.get(found[1].lower())) is None:
        return None
    positions = 40960
    if found[2]:
        positions = _BASE_POSITIONS if found[2].lower() == "base" else _LONG_POSITIONS
    return name, model.shape.model_copy(update={"max_position_embeddings": positions})


def find_shape(name: str) -> tuple[str, ModelShape]:
    """Return (full name, shape) of `name`: a key, a hub name, a folder, or 'embedded'.

    Reads config.json of a folder, and no weights.

    Raises:
        ModelNotFoundError: it is none of these.
        ConfigError: the folder's config.json does not describe a dense Qwen3.
    """
    if name == EMBEDDED_MODEL_NAME:
        from qwen3ft.embedded import MODEL_DIR

        return name, read_shape(MODEL_DIR)
    if (folder := Path(name).expanduser()).is_dir():
        return str(folder), read_shape(folder)
    if (found := known_shape(name)) is not None:
        return found
    keys = ", ".join(model.key for model in KNOWN_MODELS)
    raise ModelNotFoundError(
        f"{name!r} is neither a known dense Qwen3 model nor a folder.",
        why=f"Known are {keys}, their names on the hub, and folders with a config.json; for any "
        "other model on the hub, start a run, which reads its shape.",
        next_command="qwen3ft plan --model 4b",
        model=name,
    )


def read_shape(folder: Path) -> ModelShape:
    """Read the shape in a folder's config.json.

    Raises:
        ConfigError: it cannot be read, does not describe a dense Qwen3, or lacks a number.
    """
    path = folder / "config.json"
    try:
        settings = read_foreign_json(path)
    except ValueError as error:
        raise _refused(path, f"it cannot be read ({error})") from error
    model_type = settings.get("model_type") if isinstance(settings, dict) else None
    if model_type != "qwen3":
        raise _refused(path, f"model_type is {str(model_type)[:80]!a}, not 'qwen3'")
    settings.setdefault("tie_word_embeddings", False)
    values = {name: settings.get(name) for name in ModelShape.model_fields}
    if missing := [name for name, value in values.items() if value is None]:
        raise _refused(path, f"it lacks {', '.join(missing)}")
    try:
        shape = ModelShape.model_validate(values, strict=True)
    except ValidationError as error:
        issue = error.errors(include_url=False)[0]
        raise _refused(path, f"{issue['loc'][0]}: {issue['msg']}") from error
    numbers = shape.model_dump(exclude={"tie_word_embeddings"})
    if bad := [
        f"{name} is {str(value)[:40]}, not 1 to {_LARGEST[name]}"
        for name, value in numbers.items()
        if not 1 <= value <= _LARGEST[name]
    ]:
        raise _refused(path, "; ".join(bad))
    if shape.num_attention_heads % shape.num_key_value_heads or shape.head_dim % 2:
        raise _refused(path, "its key heads do not divide its query heads, or a head is odd")
    return shape


def count_adapter_parameters(shape: ModelShape, r: int) -> int:
    """Count the parameters of A (r x in) and B (out x r) for all projections of all layers."""
    per_layer = sum(r * (out + inp) for out, inp in shape.projection_sizes().values())
    return per_layer * shape.num_hidden_layers


def plan_adapter(config: TrainingConfig, shape: ModelShape) -> AdapterSpec:
    """Return the adapter that `config` asks for, with its size on a model of `shape`.

    Raises:
        ConfigError: the rank exceeds the smallest dimension of a projection.
    """
    smallest = min(min(sizes) for sizes in shape.projection_sizes().values())
    if config.lora_r > smallest:
        raise ConfigError(
            f"lora_r is {config.lora_r}, but the smallest projection has {smallest} features.",
            why="A rank above the smaller side of a matrix adds parameters without adding freedom.",
            next_command=f"qwen3ft plan --set lora_r={min(16, smallest)}",
        )
    return AdapterSpec(
        r=config.lora_r,
        alpha=config.lora_alpha,
        dropout=config.lora_dropout,
        target_modules=PROJECTIONS,
        trainable_parameters=count_adapter_parameters(shape, config.lora_r),
        total_parameters=shape.total_parameters,
    )


def adapter_for(adapter: AdapterSpec, shape: ModelShape) -> AdapterSpec:
    """Return `adapter` with its size on a model of another shape."""
    return adapter.model_copy(
        update={
            "trainable_parameters": count_adapter_parameters(shape, adapter.r),
            "total_parameters": shape.total_parameters,
        }
    )


def _refused(path: Path, reason: str) -> ConfigError:
    return ConfigError(
        f"Cannot read the shape of a model from {path}: {reason}.",
        why="Memory and speed are computed from the config.json of a dense Qwen3.",
        next_command="qwen3ft plan --model 4b",
        path=str(path),
    )
