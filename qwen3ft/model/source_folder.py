"""A model's folder from elsewhere: what is read of it, and that it is a plain dense Qwen3.

Everything is checked by headers and small JSON files, before transformers or torch reads any of it.
Settings that are not listed here are not passed on, and files that lead out of the folder are
refused; the links of the hub's own cache, from snapshots to blobs, are followed.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from qwen3ft.disk.files import read_foreign_json
from qwen3ft.errors import ConfigError, TokenizerError
from qwen3ft.model.adapter_checks import ADAPTER_CONFIG_FILE
from qwen3ft.model.shapes import read_shape
from qwen3ft.model.tensor_files import Tensor, read_header
from qwen3ft.records.model import ATTENTION_PROJECTIONS, ModelShape
from qwen3ft.text.commands import shell_line
from qwen3ft.units import MIB

MOST_TEXT_BYTES = 64 * MIB
"""Largest tokenizer.json; Qwen3's has 11 MiB."""

_READ_SUFFIXES = (".safetensors", ".json", ".jinja", ".txt")
_TEMPLATE_FOLDER = "additional_chat_templates"  # transformers reads templates there too
_CONFIG, _GENERATION = "config.json", "generation_config.json"
_TOKENIZER_CONFIG = "tokenizer_config.json"
_WEIGHTS, _INDEX = "model.safetensors", "model.safetensors.index.json"
_WEIGHT_DTYPES = ("BF16", "F16", "F32")

_CODE_KEYS = ("auto_map", "_attn_implementation_internal", "trust_remote_code", "custom_pipelines")
_TOKENIZER_CLASSES = (
    *("Qwen2Tokenizer", "Qwen2TokenizerFast", "Qwen3Tokenizer", "Qwen3TokenizerFast"),
    *("PreTrainedTokenizerFast", "TokenizersBackend"),
)
_ROPE_TYPES = ("default", "linear", "dynamic", "yarn", "longrope", "llama3")
_ROPE_KEYS = ("rope_parameters", "rope_scaling")

# Each with its largest value; 0 is allowed for all.
_NUMBERS = {
    "rms_norm_eps": 1.0,
    "attention_dropout": 0.999,
    "initializer_range": 10.0,
    "rope_theta": 1e12,
    "sliding_window": 1e9,
    "max_window_layers": 1e4,
}
_IDS = ("bos_token_id", "eos_token_id", "pad_token_id")
_SAME_IN_EVERY_QWEN3 = {
    "hidden_act": "silu",
    "attention_bias": False,
    "use_sliding_window": False,
    "quantization_config": None,
}
_SAMPLING = {
    "temperature": 100.0,
    "top_p": 1.0,
    "top_k": 1e6,
    "min_p": 1.0,
    "repetition_penalty": 100.0,
    "max_length": 1e9,
    "max_new_tokens": 1e9,
}
_GENERATION_KEYS = (
    *(*_IDS, *_SAMPLING, "do_sample", "use_cache", "transformers_version", "_from_model_config"),
)


def check_model_folder(folder: Path) -> ModelShape:
    """Read the shape of a model folder, which must hold a plain dense Qwen3 in safetensors.

    Raises:
        ConfigError: it does not.
        TokenizerError: its tokenizer is refused (see `check_tokenizer_files`).
    """
    shape = read_shape(folder)
    try:
        for path in files_read(folder):
            _require_inside(path, folder)
        # transformers would load the base model that it names instead, and the adapter.
        if (folder / ADAPTER_CONFIG_FILE).exists():
            raise ValueError(f"it has an {ADAPTER_CONFIG_FILE}, so it is an adapter and no model")
        read_settings(folder)
        _check_generation(folder, shape)
        _check_weights(folder, shape)
    except (OSError, ValueError) as error:
        raise _refused(folder, str(error)) from error
    check_tokenizer_files(folder)
    return shape


def read_settings(folder: Path) -> dict[str, Any]:
    """Return the settings in config.json that make a dense Qwen3, and no others.

    Raises:
        ValueError: one of them is not of that kind, or the model asks for its own code.
    """
    given = read_foreign_json(folder / _CONFIG)
    if not isinstance(given, dict):
        raise ValueError(f"{_CONFIG} holds no settings")
    if found := [key for key in _CODE_KEYS if key in given]:
        raise ValueError(f"{_CONFIG} asks for its own code ({', '.join(found)})")
    for name, value in _SAME_IN_EVERY_QWEN3.items():
        if given.get(name, value) not in (value, None):
            raise ValueError(f"{name} in {_CONFIG} is not {value!r}")
    kept = (*ModelShape.model_fields, *_NUMBERS, *_IDS, *_ROPE_KEYS)
    settings = {name: given[name] for name in kept if given.get(name) is not None}
    _require_numbers(settings, _NUMBERS)
    _require_ids(settings, settings["vocab_size"])
    for name in _ROPE_KEYS:
        _require_rope(settings.get(name, {}))
    layers = given.get("layer_types")
    if layers is not None and layers != ["full_attention"] * settings["num_hidden_layers"]:
        raise ValueError(f"layer_types in {_CONFIG} is not full attention in every layer")
    return {"architectures": ["Qwen3ForCausalLM"], "model_type": "qwen3", **settings}


def weight_files(folder: Path) -> list[Path]:
    """Return the safetensors files that transformers loads: one, or those in the index, sorted.

    Raises:
        ValueError: there are none, or the index names something else than a file beside it.
    """
    if (folder / _WEIGHTS).exists():
        return [folder / _WEIGHTS]
    if not (folder / _INDEX).exists():
        raise ValueError("it has no model.safetensors, and pickled weights are never loaded")
    index = read_foreign_json(folder / _INDEX)
    places = index.get("weight_map") if isinstance(index, dict) else None
    if not isinstance(places, dict) or not places:
        raise ValueError(f"{_INDEX} has no weight_map")
    names = {name if isinstance(name, str) else "" for name in places.values()}
    for name in names:
        if Path(name).name != name or not name.endswith(".safetensors"):
            raise ValueError(f"{_INDEX} names {name[:80]!a}, no .safetensors file beside it")
    found = [folder / name for name in sorted(names)]
    left = dict(places)
    for path in found:
        _require_inside(path, folder)
        for tensor in read_header(path):
            if left.pop(tensor.name, None) != path.name:
                raise ValueError(f"{_INDEX} does not say that {tensor.name!a} is in {path.name}")
    if left:
        raise ValueError(f"{_INDEX} names {next(iter(left))[:80]!a}, which no file has")
    return found


def check_tokenizer_files(folder: Path) -> None:
    """Raise unless the tokenizer in `folder` is files of modest size, without code of its own.

    Raises:
        TokenizerError: it is something else.
    """
    try:
        for path in files_read(folder):
            _require_inside(path, folder)
            if path.suffix != ".safetensors" and path.stat().st_size > MOST_TEXT_BYTES:
                raise ValueError(f"{path.name} has more than {MOST_TEXT_BYTES // MIB} MiB")
        if not (folder / _TOKENIZER_CONFIG).exists():
            return
        settings = read_foreign_json(folder / _TOKENIZER_CONFIG)
        if not isinstance(settings, dict):
            raise ValueError(f"{_TOKENIZER_CONFIG} holds no settings")
        # The last three name other files to read.
        named = (*_CODE_KEYS, "fast_tokenizer_files", "tokenizer_file", "vocab_file")
        if found := [key for key in named if settings.get(key) is not None]:
            raise ValueError(f"{_TOKENIZER_CONFIG} asks for its own code or files ({found[0]})")
        kind = settings.get("tokenizer_class")
        if kind is not None and kind not in _TOKENIZER_CLASSES:
            raise ValueError(f"tokenizer_class is {str(kind)[:80]!a}, which is not Qwen's")
    except (OSError, ValueError) as error:
        raise TokenizerError(
            f"The tokenizer in {folder} is refused: {error}.",
            why="Only plain files of a Qwen tokenizer are read, never code that comes with them.",
            next_command=shell_line("ls", "-l", folder),
            folder=str(folder),
        ) from error


def files_read(folder: Path) -> Iterator[Path]:
    """Yield whatever transformers may read of a folder, whether or not it is a file."""
    for path in (*folder.iterdir(), *folder.glob(f"{_TEMPLATE_FOLDER}/*")):
        if path.suffix in _READ_SUFFIXES:
            yield path


def _require_inside(path: Path, folder: Path) -> None:
    """Raise ValueError unless `path` is a file in the folder, or in the blobs of a hub's cache."""
    if not os.path.isfile(path):  # noqa: PTH113  pathlib's raises for some names
        raise ValueError(f"{path.name!a} is not a regular file")
    home, real = folder.resolve(), path.resolve()
    if real.is_relative_to(home):
        return
    if home.parent.name == "snapshots" and real.parent == home.parent.parent / "blobs":
        return
    raise ValueError(f"{path.name!a} leads out of the folder, to {str(real)[:200]!a}")


def _require_numbers(settings: dict[str, Any], largest: dict[str, float]) -> None:
    for name in settings.keys() & largest.keys():
        value = settings[name]
        is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
        if not is_number or not 0 <= value <= largest[name]:
            raise ValueError(f"{name} is not a number from 0 to {largest[name]:g}")


def _require_ids(settings: dict[str, Any], vocab_size: int) -> None:
    for name in _IDS:
        value = settings.get(name)
        for one in value if isinstance(value, list) else [] if value is None else [value]:
            if type(one) is not int or not 0 <= one < vocab_size:
                raise ValueError(f"{name} is not among the {vocab_size:,} tokens")


def _require_rope(settings: Any) -> None:
    if not isinstance(settings, dict):
        raise ValueError("the settings of rotary embeddings are not an object")
    for name, value in settings.items():
        if name in ("rope_type", "type"):
            if value not in _ROPE_TYPES:
                raise ValueError(f"{name} of rotary embeddings is {str(value)[:40]!a}")
            continue
        numbers = value if isinstance(value, list) else [value]
        if len(numbers) > 4096 or not all(_is_finite(number) for number in numbers):
            raise ValueError(f"{name[:40]!a} of rotary embeddings is not a number")


def _is_finite(value: Any) -> bool:
    return value is None or (isinstance(value, (int, float)) and -1e30 <= value <= 1e30)


def _check_generation(folder: Path, shape: ModelShape) -> None:
    path = folder / _GENERATION
    if not path.exists():
        return
    settings = read_foreign_json(path)
    if not isinstance(settings, dict):
        raise ValueError(f"{_GENERATION} holds no settings")
    # transformers writes switches that are off, such as output_attentions; those ask for nothing
    asked = {name for name, value in settings.items() if value is not None and value is not False}
    if unknown := sorted(asked - set(_GENERATION_KEYS)):
        raise ValueError(f"{_GENERATION} asks for {unknown[0][:80]!a}")
    _require_numbers({k: v for k, v in settings.items() if v is not None}, _SAMPLING)
    _require_ids(settings, shape.vocab_size)


def _check_weights(folder: Path, shape: ModelShape) -> None:
    """Raise ValueError unless the weights are exactly those of the shape."""
    found: dict[str, Tensor] = {}
    for path in weight_files(folder):
        for tensor in read_header(path):
            if tensor.name in found:
                raise ValueError(f"{tensor.name!a} is in two files")
            found[tensor.name] = tensor
    expected = _weight_shapes(shape)
    if shape.tie_word_embeddings:  # some models store the head all the same
        expected.setdefault("lm_head.weight", expected["model.embed_tokens.weight"])
        if (embedding := found.get("model.embed_tokens.weight")) is not None:
            found.setdefault("lm_head.weight", embedding)
    if different := sorted(found.keys() ^ expected.keys()):
        has = "has" if different[0] in found else "lacks"
        raise ValueError(f"it {has} {different[0][:200]!a}, unlike a Qwen3 of its config.json")
    for name, tensor in found.items():
        if tensor.shape != expected[name]:
            raise ValueError(f"{name} has the shape {tensor.shape} instead of {expected[name]}")
        if tensor.dtype not in _WEIGHT_DTYPES:
            raise ValueError(f"{name} is {tensor.dtype}, not one of {', '.join(_WEIGHT_DTYPES)}")


def _weight_shapes(shape: ModelShape) -> dict[str, tuple[int, ...]]:
    """Return the shape of every weight of a Qwen3, by its name."""
    hidden, head = (shape.hidden_size,), (shape.head_dim,)
    shapes: dict[str, tuple[int, ...]] = {
        "model.embed_tokens.weight": (shape.vocab_size, shape.hidden_size),
        "model.norm.weight": hidden,
    }
    if not shape.tie_word_embeddings:
        shapes["lm_head.weight"] = (shape.vocab_size, shape.hidden_size)
    for layer in range(shape.num_hidden_layers):
        start = f"model.layers.{layer}"
        norms = {"input_layernorm": hidden, "post_attention_layernorm": hidden}
        norms |= {"self_attn.q_norm": head, "self_attn.k_norm": head}
        shapes |= {f"{start}.{name}.weight": size for name, size in norms.items()}
        for projection, size in shape.projection_sizes().items():
            block = "self_attn" if projection in ATTENTION_PROJECTIONS else "mlp"
            shapes[f"{start}.{block}.{projection}.weight"] = size
    return shapes


def _refused(folder: Path, reason: str) -> ConfigError:
    return ConfigError(
        f"{folder} cannot be fine-tuned: {reason}.",
        why="qwen3ft trains dense Qwen3 models from safetensors and never runs a model's own code.",
        next_command="qwen3ft plan --set model_name=Qwen/Qwen3-4B-Thinking-2507",
        folder=str(folder),
    )
