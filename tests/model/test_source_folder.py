"""A model from elsewhere is a plain Qwen3 within its folder, or refused before it is loaded."""

from __future__ import annotations

import json
import os
import shutil
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from qwen3ft.embedded import MODEL_DIR
from qwen3ft.errors import ConfigError, FinetuneError, TokenizerError
from qwen3ft.model import source_folder
from qwen3ft.model.source_folder import (
    check_model_folder,
    check_tokenizer_files,
    read_settings,
    weight_files,
)
from qwen3ft.model.tensor_files import read_header

WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"
NORM = "model.norm.weight"
DEEP = "[" * 100_000 + "]" * 100_000

Harm = Callable[[Path], object]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return Path(shutil.copytree(MODEL_DIR, tmp_path / "home" / "model"))


def refusal(folder: Path) -> FinetuneError:
    """The error with which the folder is refused; it says what to do next."""
    with pytest.raises((ConfigError, TokenizerError)) as raised:
        check_model_folder(folder)
    assert raised.value.why
    assert raised.value.next_command
    assert str(raised.value).replace("\n", "").isprintable()
    return raised.value


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


def test_the_embedded_model_and_its_shards_are_taken(folder: Path) -> None:
    """In one file, and in several with an index; only those of the index are loaded."""
    shape = check_model_folder(folder)
    assert [path.name for path in weight_files(folder)] == [WEIGHTS]
    split(folder, "model-1.safetensors", "model-2.safetensors")
    shutil.copyfile(MODEL_DIR / WEIGHTS, folder / "other.safetensors")
    assert check_model_folder(folder) == shape
    names = [path.name for path in weight_files(folder)]
    assert names == ["model-1.safetensors", "model-2.safetensors"]


# --- config.json ---


@pytest.mark.parametrize(
    ("name", "value"),
    [
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
    ],
)
def test_a_config_that_is_not_a_qwen3_s_is_refused(folder: Path, name: str, value: Any) -> None:
    """Wrong types, numbers out of range or against the weights, code, other layers."""
    change_json(folder / "config.json", **{name: value})
    refusal(folder)


def test_what_is_not_known_in_a_config_is_not_passed_on(folder: Path) -> None:
    """Such as names of other files, or a number of labels that transformers makes a table of."""
    change_json(
        folder / "config.json", transformers_weights="../x", num_labels=10**9, _name_or_path="/x"
    )
    check_model_folder(folder)
    kept = read_settings(folder)
    assert not {"transformers_weights", "num_labels", "_name_or_path"} & kept.keys()
    assert kept["hidden_size"] == 128


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


@pytest.mark.parametrize(
    "harm",
    [
        *(_link_out(name) for name in ("config.json", WEIGHTS, "tokenizer.json")),
        *(_link_out(name) for name in ("chat_template.jinja", "tokenizer_config.json")),
        _replaced("chat_template.jinja", lambda path: path.symlink_to("/etc/passwd")),
        _replaced("tokenizer.json", lambda path: path.symlink_to("/dev/zero")),
        _replaced(WEIGHTS, lambda path: path.symlink_to(path)),
        _replaced(WEIGHTS, lambda path: path.symlink_to("nowhere.safetensors")),
        _replaced(WEIGHTS, os.mkfifo),
        _replaced(WEIGHTS, Path.mkdir),
        _replaced("config.json", os.mkfifo),
        _replaced("config.json", Path.mkdir),
        _replaced("tokenizer_config.json", os.mkfifo),
        _replaced("tokenizer.json", Path.mkdir),
        _replaced("generation_config.json", lambda path: path.symlink_to("/dev/random")),
        _templates(os.mkfifo),
        _templates(lambda path: path.symlink_to("/etc/passwd")),
        _written("config.json", DEEP),
        _written("config.json", '{"model_type": "qwen3", "x": ' + DEEP + "}"),
        _written("tokenizer_config.json", DEEP),
        _written("tokenizer_config.json", "[]"),
        _written("generation_config.json", DEEP),
        _written("generation_config.json", "[]"),
        _sparse("config.json"),
        _sparse("tokenizer.json"),
        _sparse("chat_template.jinja"),
        _sparse(WEIGHTS),
        _cut,
        _longer,
        _huge_header,
        _header(lambda header: header.pop(NORM)),
        _header(lambda header: header[NORM].update(dtype="F64")),
        _header(lambda header: header[NORM].update(shape=[64, 2])),
        _header(lambda header: header[NORM].update(data_offsets=[0, 256])),
        _header(lambda header: header.update({"model.norm.weight\x1b[2J": header.pop(NORM)})),
        _header(lambda header: header.update({"x" * 10_000: header.pop(NORM)})),
        _header(lambda header: header.update({"evil.weight": header.pop(NORM)})),
        _named("../real.safetensors"),
        _named("/etc/passwd"),
        _named("..\\real.safetensors"),
        _named("model-1.safetensors"),
        _named("pytorch_model.bin"),
        _named("a\0b.safetensors"),
        _named("x" * 5000 + ".safetensors"),
        _named(7),
        _named(""),
        _indexed(lambda folder, _: write_index(folder, {})),
        _indexed(lambda folder, _: write_index(folder, ["model-1.safetensors"])),
        _indexed(
            lambda folder, places: write_index(folder, {**places, "more": "model-1.safetensors"})
        ),
        _indexed(lambda folder, places: write_index(folder, dict(list(places.items())[1:]))),
        _indexed(lambda folder, _: (folder / INDEX).write_text(DEEP)),
        _indexed(_in_two_files),
        lambda folder: split(folder, "model-1.safetensors") and (folder / INDEX).unlink(),
        lambda folder: (folder / WEIGHTS).rename(folder / "pytorch_model.bin"),
    ],
)
def test_files_that_are_not_those_of_a_model_are_refused(folder: Path, harm: Harm) -> None:
    """Outside of the folder, no files at all, endless, nested, cut off, other tensors, pickles."""
    harm(folder)
    refusal(folder)


@pytest.mark.parametrize(
    ("name", "changes"),
    [
        ("generation_config.json", {"custom_generate": "evil/repo"}),
        ("generation_config.json", {"num_return_sequences": 10**9}),
        ("generation_config.json", {"eos_token_id": [10**9]}),
        ("generation_config.json", {"temperature": "hot"}),
        ("tokenizer_config.json", {"auto_map": {"AutoTokenizer": ["evil.Tokenizer", None]}}),
        ("tokenizer_config.json", {"tokenizer_class": "TransfoXLTokenizer"}),
        ("tokenizer_config.json", {"tokenizer_class": ["Qwen2Tokenizer"]}),
        ("tokenizer_config.json", {"tokenizer_file": "/etc/passwd"}),
        ("tokenizer_config.json", {"fast_tokenizer_files": ["tokenizer.9.json"]}),
    ],
)
def test_settings_of_other_things_are_refused(
    folder: Path, name: str, changes: dict[str, Any]
) -> None:
    """Code, other files, other classes, numbers without measure."""
    change_json(folder / name, **changes)
    refusal(folder)


# --- links ---


def test_links_within_and_to_the_folder_are_followed(folder: Path, tmp_path: Path) -> None:
    """A model folder may itself be a link, and its files may link to each other."""
    (folder / WEIGHTS).rename(folder / "real.safetensors")
    (folder / WEIGHTS).symlink_to("real.safetensors")
    (tmp_path / "link").symlink_to(folder)
    check_model_folder(tmp_path / "link")


def in_cache(folder: Path, blobs: Path) -> Path:
    """Move the files to `blobs`, as the hub's cache keeps them, with links from a snapshot."""
    snapshot = folder.parent / "snapshots" / ("a" * 40)
    snapshot.mkdir(parents=True)
    blobs.mkdir(parents=True)
    for number, path in enumerate(sorted(folder.iterdir())):
        path.rename(blobs / f"{number:064}")
        (snapshot / path.name).symlink_to(os.path.relpath(blobs / f"{number:064}", snapshot))
    return snapshot


def test_the_links_of_a_hub_s_cache_are_followed(folder: Path, tmp_path: Path) -> None:
    """From snapshots/COMMIT to the blobs beside snapshots, and nowhere else."""
    check_model_folder(in_cache(folder, folder.parent / "blobs"))
    other = Path(shutil.copytree(MODEL_DIR, tmp_path / "other" / "model"))
    snapshot = in_cache(other, tmp_path / "elsewhere" / "blobs")
    assert "leads out" in refusal(snapshot).what
    with pytest.raises(TokenizerError, match="leads out"):
        check_tokenizer_files(snapshot)


def test_a_head_that_is_tied_may_be_stored(folder: Path) -> None:
    """Some of Qwen3's small models have it in their files all the same."""
    shape = source_folder.read_shape(folder)
    size_bytes = 2 * shape.vocab_size * shape.hidden_size
    end = (folder / WEIGHTS).stat().st_size

    def add(header: dict[str, Any]) -> None:
        start = max(e["data_offsets"][1] for n, e in header.items() if n != "__metadata__")
        entry = {"dtype": "BF16", "shape": [shape.vocab_size, shape.hidden_size]}
        header["lm_head.weight"] = {**entry, "data_offsets": [start, start + size_bytes]}

    change_header(folder / WEIGHTS, add)
    with (folder / WEIGHTS).open("ab") as stream:
        stream.write(b"\0" * size_bytes)
    assert (folder / WEIGHTS).stat().st_size > end
    check_model_folder(folder)
