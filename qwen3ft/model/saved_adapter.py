"""The folder of a saved adapter: its file names, reading it back, and checks before it is used.

    <output_dir>/<run_id>/
      adapter_model.safetensors  adapter_config.json   as PEFT writes them
      tokenizer.json  tokenizer_config.json
      chat_template.jinja                              thinks by default if the rows did
      generation_config.json                           decoding as in the test
      MLmodel  input_example.json                      for MLflow to load and serve it
      provenance.json                                  base, data, settings and results of the run
      known_rows.npy                                   hashes of the rows that it was trained on
      README.md                                        the model card
      manifest.json                                    written last: sha256 of every file

`qwen3ft.model.save_adapter` writes it. `open_adapter` is the one way in: whoever loads, promotes,
fetches or exports an adapter gets it from there, checked (`qwen3ft.model.adapter_checks`).
"""

from __future__ import annotations

import os
import shlex
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from qwen3ft.disk.files import read_foreign_json, sha256_file
from qwen3ft.disk.manifests import MANIFEST_NAME, read_manifest_facts
from qwen3ft.errors import ModelNotFoundError, ModelUnavailableError, SaveError
from qwen3ft.logs import get_logger
from qwen3ft.model.adapter_checks import (
    ADAPTER_CONFIG_FILE,
    ADAPTER_FILE,
    AdapterError,
    AdapterLayout,
    verify_adapter,
)
from qwen3ft.records.model import AdapterSpec, ModelShape
from qwen3ft.records.provenance import MOST_TEXT_CHARACTERS, Provenance
from qwen3ft.units import GIB

logger = get_logger("saved_adapter")

PROVENANCE_FILE = "provenance.json"
_OLD_PROVENANCE_FILE = "run_card.json"  # in adapters registered earlier; read for one release
KNOWN_ROWS_FILE = "known_rows.npy"
TOKENIZER_FILES = (
    *("tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "special_tokens_map.json"),
)
TEMPLATE_FILE, GENERATION_FILE = "chat_template.jinja", "generation_config.json"

MOST_OTHER_BYTES = GIB
"""Limit for all files but the weights: known rows take 8 bytes each, a tokenizer 11 MB."""


@dataclass(frozen=True)
class OpenedAdapter:
    """A saved adapter that was checked: whole, its own in every file, plain LoRA, finite."""

    folder: Path
    provenance: dict[str, Any]
    """Base, data, settings and results of its run; the fields of `Provenance` are there."""
    spec: AdapterSpec
    layout: AdapterLayout


def open_adapter(folder: Path) -> OpenedAdapter:
    """Check the saved adapter in `folder`; nothing of it is used before.

    Raises:
        ModelNotFoundError: a file of a saved adapter is missing.
        SaveError: a file is not in the manifest or differs from it; or the adapter is not plain
            LoRA, does not match its provenance, or has values that are not finite.
    """
    _require_files(folder)
    try:
        _require_modest_size(folder)
        provenance = read_provenance(folder)
        spec = _parse_provenance(provenance)
        layout = verify_adapter(folder, spec, _files_read(folder))
        _require_base(read_foreign_json(folder / ADAPTER_CONFIG_FILE), provenance["base"])
    except (ValueError, OSError) as error:
        raise refused_adapter(folder, str(error)) from error
    return OpenedAdapter(folder, provenance, spec, layout)


def refused_adapter(folder: Path, reason: str) -> SaveError:
    """Return the error for an adapter that must not be used."""
    return SaveError(
        f"The adapter in {folder} is damaged: {reason}.",
        why="Its files differ from those that a run saves and verifies.",
        next_command="qwen3ft history",
        path=str(folder),
    )


def _require_files(folder: Path) -> None:
    names = (ADAPTER_FILE, ADAPTER_CONFIG_FILE)
    missing = [name for name in names if not os.path.isfile(folder / name)]  # noqa: PTH113
    if not has_provenance(folder):
        missing.append(PROVENANCE_FILE)
    if missing:
        raise ModelNotFoundError(
            f"{ascii(str(folder))[1:-1][:MOST_TEXT_CHARACTERS]} is not a saved adapter: "
            f"{', '.join(missing)} missing.",
            why="A saved adapter is a folder that a run wrote below output_dir.",
            next_command="qwen3ft history",
            path=str(folder),
        )


def _files_read(folder: Path) -> tuple[str, ...]:
    """Return the files that are read of the adapter, besides settings and weights."""
    records = (_OLD_PROVENANCE_FILE, PROVENANCE_FILE, KNOWN_ROWS_FILE)
    optional = (*records, GENERATION_FILE, *TOKENIZER_FILES)
    return tuple(name for name in optional if (folder / name).exists())


def _require_modest_size(folder: Path) -> None:
    others = [path for path in folder.iterdir() if path.name != ADAPTER_FILE]
    if sum(path.stat().st_size for path in others if path.is_file()) > MOST_OTHER_BYTES:
        raise AdapterError(
            f"its files besides the weights have more than {MOST_OTHER_BYTES:,} bytes"
        )


def copy_adapter(adapter: OpenedAdapter, target: Path) -> None:
    """Copy the files of the adapter's manifest, and no others, into the folder `target`."""
    for name in read_foreign_json(adapter.folder / MANIFEST_NAME)["files"]:
        (target / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(adapter.folder / name, target / name)


# --- provenance ---


def _parse_provenance(provenance: dict[str, Any]) -> AdapterSpec:
    """Return the adapter that was trained.

    Raises:
        AdapterError: a field that is used is missing, or is not what a run writes.
    """
    try:
        return Provenance.model_validate(provenance).plan.adapter
    except ValidationError as error:
        issue = error.errors(include_url=False, include_input=False, include_context=False)[0]
        place = ".".join(map(str, issue["loc"])) or "config"
        raise AdapterError(f"{PROVENANCE_FILE}: {place[:200]!a}: {issue['msg'][:200]!a}") from error


def _require_base(settings: dict[str, Any], base: dict[str, Any]) -> None:
    """Raise AdapterError unless PEFT's settings name the base model of the provenance."""
    named = (settings.get("base_model_name_or_path"), settings.get("revision"))
    if named != portable_base(base["model_name"], base["revision"], base["local_path"]):
        raise AdapterError(f"{ADAPTER_CONFIG_FILE} names another base model than {PROVENANCE_FILE}")


def portable_base(model_name: str, revision: str, local_path: str | None) -> tuple[str, str | None]:
    """Return base_model_name_or_path and revision by which other tools find the base model."""
    # The revision of a local model is our own hash, which the hub does not know.
    return local_path or model_name, None if local_path else revision


def has_provenance(folder: Path) -> bool:
    """Return True if `folder` looks like a saved adapter; `open_adapter` makes sure."""
    names = (PROVENANCE_FILE, _OLD_PROVENANCE_FILE)
    # Unlike pathlib's, it returns False for a name that no file can have.
    return any(os.path.isfile(folder / name) for name in names)  # noqa: PTH113


def read_provenance(folder: Path) -> dict[str, Any]:
    """Read what an adapter was trained from; `open_adapter` also checks that it is all there.

    Raises:
        ValueError: the file is not a JSON object.
    """
    path = folder / PROVENANCE_FILE
    if not path.is_file():
        path = folder / _OLD_PROVENANCE_FILE
    provenance = read_foreign_json(path)
    if not isinstance(provenance, dict):
        raise ValueError(f"{path.name} holds no object")
    return provenance


def was_trained_to_think(provenance: dict[str, Any]) -> bool:
    """Return True if most training rows had reasoning."""
    data: dict[str, Any] = provenance["data"]
    if "reasoning_rows" not in data:  # written by an earlier version
        return provenance["config"].get("reasoning_separator") is not None
    return 2 * int(data["reasoning_rows"]) > int(data["usable_rows"])


def most_answer_tokens(provenance: dict[str, Any]) -> int:
    """Return the tokens of the longest answer in the test, with its thinking if it was trained."""
    config = provenance["config"]
    thinking = config.get("max_thinking_tokens", 0) if was_trained_to_think(provenance) else 0
    return int(config["max_new_tokens"] + thinking)


def find_base(adapter: OpenedAdapter) -> str:
    """Return the folder of the 4-bit snapshot that the adapter was trained on.

    Raises:
        ModelUnavailableError: it is gone, or another one lies in its place.
        SaveError: the adapter does not fit it.
    """
    base = adapter.provenance["base"]
    snapshot = Path(base["snapshot_path"])
    if not os.path.isfile(snapshot / MANIFEST_NAME):  # noqa: PTH113  never raises
        problem = f"is not at {snapshot}"
    elif not _same_origin(read_manifest_facts(snapshot), base):
        problem = f"at {snapshot} is not the one that the adapter was trained on"
    else:
        # The same revision quantised again is accepted: other library versions write other bytes.
        if sha256_file(snapshot / MANIFEST_NAME) != base["snapshot_manifest_sha256"]:
            logger.warning("%s was quantised again since the adapter was trained", snapshot)
        require_fit(adapter, shape_of(snapshot))
        return str(snapshot)
    setting = f"--set {shlex.quote('model_name=' + base['model_name'])}"
    if base["local_path"] is None:
        setting += f" --set {shlex.quote('model_revision=' + base['revision'])}"
    raise ModelUnavailableError(
        f"The 4-bit {base['model_name']} {problem}.",
        why="The cache was cleaned, rebuilt or is on another machine.",
        next_command=f"qwen3ft plan {setting}",
        base=base,
    )


def require_fit(adapter: OpenedAdapter, shape: ModelShape) -> None:
    """Raise SaveError unless the adapter is for a model of this shape."""
    try:
        adapter.layout.require_fit(shape)
    except AdapterError as fault:
        raise refused_adapter(adapter.folder, str(fault)) from fault


def shape_of(snapshot: Path) -> ModelShape:
    """Return the shape in a snapshot's manifest.

    Raises:
        ModelUnavailableError: it has none.
    """
    try:
        return ModelShape.model_validate(read_manifest_facts(snapshot).get("shape"))
    except ValidationError as error:
        raise ModelUnavailableError(
            f"The 4-bit model at {snapshot} does not say what shape it has.",
            why="Its manifest was changed.",
            next_command="qwen3ft clean --dry-run",
        ) from error


def _same_origin(facts: dict[str, Any], base: dict[str, Any]) -> bool:
    """Return True if a snapshot's manifest has the revision and quantisation of `base`."""
    source = facts.get("source", {})
    found = (source.get("revision"), facts.get("quantization"))
    return found == (base["revision"], base["quantization"])
