"""Harm done to a model's folder, by name: what must be refused."""

from __future__ import annotations

import json
import os
import shutil
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

from qwen3ft.model.tensor_files import read_header

WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"
NORM = "model.norm.weight"
DEEP = "[" * 100_000 + "]" * 100_000

Harm = Callable[[Path], object]


def change_json(path: Path, **changes: Any) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def change_header(path: Path, change: Callable[[dict[str, Any]], object]) -> None:
    """Rewrite the header of a safetensors file; its data stay."""
    content = path.read_bytes()
    (length,) = struct.unpack("<Q", content[:8])
    header = json.loads(content[8 : 8 + length])
    change(header)
    text = json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + content[8 + length :])


def split(folder: Path, *names: str) -> dict[str, str]:
    """Make several files of the weights, with an index, which is returned."""
    path = folder / WEIGHTS
    content, tensors, places = path.read_bytes(), read_header(path), {}
    for number, name in enumerate(names):
        header, data = {}, b""
        for tensor in tensors[number :: len(names)]:
            part = content[tensor.start : tensor.end]
            offsets = [len(data), len(data) + len(part)]
            entry = {"dtype": tensor.dtype, "shape": tensor.shape, "data_offsets": offsets}
            header[tensor.name], data = entry, data + part
            places[tensor.name] = name
        text = json.dumps(header).encode()
        (folder / name).write_bytes(struct.pack("<Q", len(text)) + text + data)
    path.unlink()
    write_index(folder, places)
    return places


def write_index(folder: Path, places: Any) -> None:
    (folder / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": places}))


# --- config.json ---

CONFIGS: list[tuple[str, Any]] = [
    ("hidden_size", "many"),
    ("hidden_size", "128"),
    ("hidden_size", -1),
    ("hidden_size", 0),
    ("hidden_size", 10**12),
    ("hidden_size", 10**4000),
    ("hidden_size", 128.5),
    ("hidden_size", True),
    ("hidden_size", [128]),
    ("num_hidden_layers", 10**9),
    ("num_hidden_layers", 4),
    ("num_attention_heads", 3),
    ("num_key_value_heads", 3),
    ("head_dim", 33),
    ("intermediate_size", 768),
    ("vocab_size", 2**31),
    ("vocab_size", 151936),
    ("tie_word_embeddings", "yes"),
    ("tie_word_embeddings", False),
    ("max_position_embeddings", 10**18),
    ("auto_map", {"AutoModelForCausalLM": "evil.Model"}),
    ("trust_remote_code", True),
    ("quantization_config", {"quant_method": "gptq", "bits": 4}),
    ("attention_bias", True),
    ("use_sliding_window", True),
    ("hidden_act", "evil"),
    ("rms_norm_eps", "small"),
    ("rms_norm_eps", 1e300),
    ("rms_norm_eps", float("nan")),
    ("attention_dropout", 2),
    ("rope_theta", -1),
    ("rope_parameters", "yarn"),
    ("rope_parameters", {"rope_type": "evil", "rope_theta": 1e6}),
    ("rope_parameters", {"rope_type": "yarn", "factor": 10**400}),
    ("rope_scaling", {"type": "longrope", "long_factor": [1.0] * 10_000}),
    ("rope_scaling", {"type": "linear", "factor": {"a": 1}}),
    ("layer_types", ["full_attention"] * 2),
    ("layer_types", ["evil"] * 3),
    ("layer_types", "full_attention"),
    ("eos_token_id", 10**12),
    ("eos_token_id", [2, -1]),
    ("pad_token_id", "2"),
    ("model_type", ["qwen3"]),
    ("model_type", "qwen3\x1b[2J"),
]


# --- the files ---


def _replaced(name: str, make: Callable[[Path], object]) -> Harm:
    def change(folder: Path) -> None:
        (folder / name).unlink()
        make(folder / name)

    return change


def _link_out(name: str) -> Harm:
    def change(folder: Path) -> None:
        outside = (folder / name).rename(folder.parent / name)
        (folder / name).symlink_to(outside)

    return change


def _written(name: str, content: str) -> Harm:
    return lambda folder: (folder / name).write_text(content)


def _sparse(name: str) -> Harm:
    def change(folder: Path) -> None:
        with (folder / name).open("r+b") as stream:
            stream.truncate(2**40)

    return change


def _cut(folder: Path) -> None:
    content = (folder / WEIGHTS).read_bytes()
    (folder / WEIGHTS).write_bytes(content[:-1])


def _longer(folder: Path) -> None:
    with (folder / WEIGHTS).open("ab") as stream:
        stream.write(b"\0")


def _huge_header(folder: Path) -> None:
    (folder / WEIGHTS).write_bytes(struct.pack("<Q", 2**60) + b"{}")


def _header(change: Callable[[dict[str, Any]], object]) -> Harm:
    return lambda folder: change_header(folder / WEIGHTS, change)


def _indexed(change: Callable[[Path, dict[str, str]], object]) -> Harm:
    def harm(folder: Path) -> None:
        change(folder, split(folder, "model-1.safetensors", "model-2.safetensors"))

    return harm


def _named(name: Any) -> Harm:
    """Let the index say that the weights are in the file `name`."""

    def change(folder: Path, places: dict[str, str]) -> None:
        (folder / "model-1.safetensors").rename(folder.parent / "real.safetensors")
        moved = {key: name if at == "model-1.safetensors" else at for key, at in places.items()}
        write_index(folder, moved)

    return _indexed(change)


def _in_two_files(folder: Path, places: dict[str, str]) -> None:
    shutil.copyfile(folder / "model-1.safetensors", folder / "model-3.safetensors")
    write_index(folder, {**places, "extra": "model-3.safetensors"})


def _templates(make: Callable[[Path], object]) -> Harm:
    def change(folder: Path) -> None:
        (folder / "additional_chat_templates").mkdir()
        make(folder / "additional_chat_templates" / "tool_use.jinja")

    return change


FILES: dict[str, Harm] = {
    **{f"{name} links out": _link_out(name) for name in ("config.json", WEIGHTS, "tokenizer.json")},
    **{
        f"{name} links out": _link_out(name)
        for name in ("chat_template.jinja", "tokenizer_config.json")
    },
    "template is /etc/passwd": _replaced(
        "chat_template.jinja", lambda path: path.symlink_to("/etc/passwd")
    ),
    "tokenizer is /dev/zero": _replaced(
        "tokenizer.json", lambda path: path.symlink_to("/dev/zero")
    ),
    "weights link to themselves": _replaced(WEIGHTS, lambda path: path.symlink_to(path)),
    "weights link to nothing": _replaced(
        WEIGHTS, lambda path: path.symlink_to("nowhere.safetensors")
    ),
    "weights are a pipe": _replaced(WEIGHTS, os.mkfifo),
    "weights are a folder": _replaced(WEIGHTS, Path.mkdir),
    "config is a pipe": _replaced("config.json", os.mkfifo),
    "config is a folder": _replaced("config.json", Path.mkdir),
    "tokenizer config is a pipe": _replaced("tokenizer_config.json", os.mkfifo),
    "tokenizer is a folder": _replaced("tokenizer.json", Path.mkdir),
    "generation config is /dev/random": _replaced(
        "generation_config.json", lambda path: path.symlink_to("/dev/random")
    ),
    "second template is a pipe": _templates(os.mkfifo),
    "second template is /etc/passwd": _templates(lambda path: path.symlink_to("/etc/passwd")),
    "config nested": _written("config.json", DEEP),
    "config with a nested value": _written(
        "config.json", '{"model_type": "qwen3", "x": ' + DEEP + "}"
    ),
    "tokenizer config nested": _written("tokenizer_config.json", DEEP),
    "tokenizer config is a list": _written("tokenizer_config.json", "[]"),
    "generation config nested": _written("generation_config.json", DEEP),
    "generation config is a list": _written("generation_config.json", "[]"),
    "config of a terabyte": _sparse("config.json"),
    "tokenizer of a terabyte": _sparse("tokenizer.json"),
    "template of a terabyte": _sparse("chat_template.jinja"),
    "weights of a terabyte": _sparse(WEIGHTS),
    "weights cut off": _cut,
    "weights with more at the end": _longer,
    "header of 2**60 bytes": _huge_header,
    "norm missing": _header(lambda header: header.pop(NORM)),
    "norm of another dtype": _header(lambda header: header[NORM].update(dtype="F64")),
    "norm of another shape": _header(lambda header: header[NORM].update(shape=[64, 2])),
    "norm in another place": _header(lambda header: header[NORM].update(data_offsets=[0, 256])),
    "norm with an escape sequence in its name": _header(
        lambda header: header.update({"model.norm.weight\x1b[2J": header.pop(NORM)})
    ),
    "name of 10,000 characters": _header(
        lambda header: header.update({"x" * 10_000: header.pop(NORM)})
    ),
    "tensor of another model": _header(
        lambda header: header.update({"evil.weight": header.pop(NORM)})
    ),
    "index leads out": _named("../real.safetensors"),
    "index names /etc/passwd": _named("/etc/passwd"),
    "index with a backslash": _named("..\\real.safetensors"),
    "index names a missing file": _named("model-1.safetensors"),
    "index names a pickle": _named("pytorch_model.bin"),
    "index with a zero byte": _named("a\0b.safetensors"),
    "index with 5,000 characters": _named("x" * 5000 + ".safetensors"),
    "index with a number": _named(7),
    "index with no name": _named(""),
    "index is empty": _indexed(lambda folder, _: write_index(folder, {})),
    "index is a list": _indexed(lambda folder, _: write_index(folder, ["model-1.safetensors"])),
    "index names a tensor too many": _indexed(
        lambda folder, places: write_index(folder, {**places, "more": "model-1.safetensors"})
    ),
    "index names a tensor too few": _indexed(
        lambda folder, places: write_index(folder, dict(list(places.items())[1:]))
    ),
    "index nested": _indexed(lambda folder, _: (folder / INDEX).write_text(DEEP)),
    "tensor in two files": _indexed(_in_two_files),
    "shards without index": lambda folder: (
        split(folder, "model-1.safetensors") and (folder / INDEX).unlink()
    ),
    "adapter of another model": _written(
        "adapter_config.json", '{"peft_type": "LORA", "base_model_name_or_path": "../other"}'
    ),
    "pickled weights alone": lambda folder: (folder / WEIGHTS).rename(folder / "pytorch_model.bin"),
}

OTHER_SETTINGS: list[tuple[str, dict[str, Any]]] = [
    ("generation_config.json", {"custom_generate": "evil/repo"}),
    ("generation_config.json", {"num_return_sequences": 10**9}),
    ("generation_config.json", {"eos_token_id": [10**9]}),
    ("generation_config.json", {"temperature": "hot"}),
    ("tokenizer_config.json", {"auto_map": {"AutoTokenizer": ["evil.Tokenizer", None]}}),
    ("tokenizer_config.json", {"tokenizer_class": "TransfoXLTokenizer"}),
    ("tokenizer_config.json", {"tokenizer_class": ["Qwen2Tokenizer"]}),
    ("tokenizer_config.json", {"tokenizer_file": "/etc/passwd"}),
    ("tokenizer_config.json", {"fast_tokenizer_files": ["tokenizer.9.json"]}),
]


def _changed(name: str, changes: dict[str, Any]) -> Harm:
    return lambda folder: change_json(folder / name, **changes)


HARMED_MODELS: dict[str, Harm] = {
    **{
        f"config {n}: {name}": _changed("config.json", {name: value})
        for n, (name, value) in enumerate(CONFIGS)
    },
    **FILES,
    **{
        f"settings {n}: {next(iter(changes))}": _changed(name, changes)
        for n, (name, changes) in enumerate(OTHER_SETTINGS)
    },
}
"""Harm by name."""
