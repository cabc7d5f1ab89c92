"""An adapter from elsewhere is used as it was saved, or refused by name, before PEFT sees it."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from support.hostile_adapters import HARMED_ADAPTERS, LAST
from support.small_adapter import (
    small_provenance,
    small_settings,
    small_tensors,
    write_small_adapter,
    write_tensors,
)

from qwen3ft.disk.files import write_json_atomic
from qwen3ft.disk.manifests import write_manifest
from qwen3ft.embedded import MODEL_DIR
from qwen3ft.errors import FinetuneError, ModelNotFoundError, ModelUnavailableError, SaveError
from qwen3ft.model.adapter_checks import ADAPTER_CONFIG_FILE, ADAPTER_FILE, LARGEST_WEIGHT
from qwen3ft.model.saved_adapter import (
    PROVENANCE_FILE,
    copy_adapter,
    find_base,
    open_adapter,
)
from qwen3ft.model.shapes import read_shape


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


@pytest.mark.parametrize("name", HARMED_ADAPTERS)
def test_a_harmed_adapter_is_refused(folder: Path, name: str) -> None:
    """Weights, settings, provenance, files and headers that no run writes.

    A manifest that vouches for them does not help: whoever can change the files can do that too.
    """
    harm, reason = HARMED_ADAPTERS[name]
    harm(folder)
    assert re.search(reason, refusal(folder).what)


def test_the_largest_weight_that_is_allowed_is_allowed(folder: Path) -> None:
    """The limit itself, subnormals and zeros are no alarm."""
    tensors = small_tensors()
    tensors[LAST][:5, 0] = [LARGEST_WEIGHT, -LARGEST_WEIGHT, 1e-45, 0.0, -0.0]
    write_tensors(folder / ADAPTER_FILE, tensors)
    open_adapter(vouch(folder))


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
