"""A model from elsewhere is a plain Qwen3 within its folder, or refused before it is loaded."""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import Any

import pytest
from support.hostile_models import HARMED_MODELS, WEIGHTS, change_header, change_json, split

from qwen3ft.embedded import MODEL_DIR
from qwen3ft.errors import ConfigError, FinetuneError, TokenizerError
from qwen3ft.model import source_folder
from qwen3ft.model.source_folder import (
    check_model_folder,
    check_tokenizer_files,
    read_settings,
    weight_files,
)


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


def test_the_embedded_model_and_its_shards_are_taken(folder: Path) -> None:
    """In one file, and in several with an index; only those of the index are loaded."""
    shape = check_model_folder(folder)
    assert [path.name for path in weight_files(folder)] == [WEIGHTS]
    split(folder, "model-1.safetensors", "model-2.safetensors")
    shutil.copyfile(MODEL_DIR / WEIGHTS, folder / "other.safetensors")
    assert check_model_folder(folder) == shape
    names = [path.name for path in weight_files(folder)]
    assert names == ["model-1.safetensors", "model-2.safetensors"]


@pytest.mark.parametrize("name", HARMED_MODELS)
def test_a_harmed_model_is_refused(folder: Path, name: str) -> None:
    """Wrong types, numbers against the weights, code, files outside, endless, nested, cut off."""
    HARMED_MODELS[name](folder)
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


def test_switches_that_are_off_ask_for_nothing(folder: Path) -> None:
    """Such as transformers writes for a model that it saves without settings of its own."""
    change_json(folder / "generation_config.json", output_attentions=False, output_scores=None)
    check_model_folder(folder)


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
