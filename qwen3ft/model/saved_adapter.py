"""A saved adapter as it is read back: the names in its folder, and the checks before it is used.

    <output_dir>/<run_id>/
      adapter_model.safetensors  adapter_config.json   as PEFT writes them
      tokenizer.json  tokenizer_config.json  chat_template.jinja
      run_card.json                                    what it was trained from, and what came out
      known_rows.npy                                   hashes of the rows that it has seen
      README.md                                        the same for people
      manifest.json                                    last: sha256 of every file

Guarantees: nothing is loaded, executed or changed here, and no torch is imported; safetensors files
are read by their header and raw bytes. `qwen3ft.model.save_adapter` writes such a folder.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qwen3ft.errors import ModelNotFoundError, ModelUnavailableError, SaveError
from qwen3ft.files import MANIFEST_NAME, find_damage, read_manifest_facts, sha256_file
from qwen3ft.logs import get_logger

logger = get_logger("saved_adapter")

ADAPTER_FILE = "adapter_model.safetensors"
ADAPTER_CONFIG_FILE = "adapter_config.json"
RUN_CARD_FILE = "run_card.json"
KNOWN_ROWS_FILE = "known_rows.npy"

_EXPONENTS = {"F64": ("<u8", 0x7FF0 << 48), "F32": ("<u4", 0x7F800000), "F16": ("<u2", 0x7C00)}
_EXPONENTS["BF16"] = ("<u2", 0x7F80)
"""IEEE 754: a value is infinite or not a number exactly if all bits of its exponent are set. Works
on raw bytes, so for bfloat16 too, which numpy does not have."""


@dataclass(frozen=True)
class Tensor:
    """Where one tensor lies in a safetensors file; offsets in bytes from the start of the file."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    start: int
    end: int


def check_adapter(folder: Path) -> None:
    """Raise unless `folder` is a saved adapter whose files are those that were saved."""
    names = (ADAPTER_FILE, ADAPTER_CONFIG_FILE, RUN_CARD_FILE)
    missing = [name for name in names if not (folder / name).is_file()]
    if missing:
        raise ModelNotFoundError(
            f"{folder} is no saved adapter: {', '.join(missing)} missing.",
            why="A saved adapter is a folder that a run wrote below output_dir.",
            next_command=f"ls {folder.parent}",
            path=str(folder),
        )
    if damage := find_damage(folder):
        raise SaveError(
            f"The adapter in {folder} is damaged: {damage}.",
            why="Its files are not those that were saved and verified.",
            next_command="qwen3ft status",
            path=str(folder),
        )


def was_trained_to_think(card: dict[str, Any]) -> bool:
    """Whether most rows of the run that `card` is about had reasoning."""
    data: dict[str, Any] = card["data"]
    if "reasoning_rows" not in data:  # a card of an earlier version
        return card["config"].get("reasoning_separator") is not None
    return 2 * int(data["reasoning_rows"]) > int(data["usable_rows"])


def read_run_card(folder: Path) -> dict[str, Any]:
    """The run card of a checked folder."""
    card: dict[str, Any] = json.loads((folder / RUN_CARD_FILE).read_text(encoding="utf-8"))
    return card


def read_degradations(folder: Path) -> tuple[str, ...]:
    """In what the run that saved `folder` fell short of what was asked for; usually nothing."""
    if not (folder / RUN_CARD_FILE).is_file():
        return ("its run card is missing",)
    return tuple(read_run_card(folder).get("degraded", ()))


def find_base(folder: Path) -> str:
    """The 4-bit snapshot that the adapter was trained on.

    One quantised again from the same revision by the same setting counts as the same: other
    versions of the libraries may write other bytes. That is logged.

    Raises:
        ModelUnavailableError: it is gone, or another one lies in its place.
    """
    base = read_run_card(folder)["base"]
    snapshot = Path(base["snapshot_path"])
    if not (snapshot / MANIFEST_NAME).is_file():
        problem = f"is not at {snapshot}"
    elif not _same_origin(read_manifest_facts(snapshot), base):
        problem = f"at {snapshot} is another one than the adapter was trained on"
    else:
        if sha256_file(snapshot / MANIFEST_NAME) != base["snapshot_manifest_sha256"]:
            logger.warning("%s was quantised again since the adapter was trained", snapshot)
        return str(snapshot)
    setting = f"--set model_name={base['model_name']}"
    if base["local_path"] is None:
        setting += f" --set model_revision={base['revision']}"
    raise ModelUnavailableError(
        f"The 4-bit {base['model_name']} {problem}.",
        why="The cache was cleaned, rebuilt or is on another machine.",
        next_command=f"qwen3ft plan {setting}",
        base=base,
    )


def _same_origin(facts: dict[str, Any], base: dict[str, Any]) -> bool:
    """Whether a snapshot's manifest names the revision and setting that the run card names."""
    source = facts.get("source", {})
    found = (source.get("revision"), facts.get("quantization"))
    return found == (base["revision"], base["quantization"])


def read_header(path: Path) -> list[Tensor]:
    """The tensors of a safetensors file (8 bytes length, JSON header, data).

    Raises:
        ValueError: the file is not of that format.
    """
    size_bytes = path.stat().st_size
    with path.open("rb") as stream:
        length = int.from_bytes(stream.read(8), "little")
        if not 2 <= length <= size_bytes - 8:
            raise ValueError(f"{path} has {size_bytes} bytes, but a header of {length}")
        header = json.loads(stream.read(length))
    try:
        header.pop("__metadata__", None)
        return [_tensor(name, entry, 8 + length, size_bytes) for name, entry in header.items()]
    except (AttributeError, KeyError, TypeError) as error:
        raise ValueError(f"{path} has no header of tensors: {error!r}") from error


def _tensor(name: str, entry: dict[str, Any], data_start: int, size_bytes: int) -> Tensor:
    start, end = (data_start + offset for offset in entry["data_offsets"])
    if not data_start <= start <= end <= size_bytes:
        raise ValueError(f"{name} lies at {start} to {end} of {size_bytes} bytes")
    return Tensor(name, entry["dtype"], tuple(entry["shape"]), start, end)


def find_non_finite(path: Path) -> Iterator[str]:
    """Names of the floating-point tensors in a safetensors file with an infinity or a NaN."""
    import numpy as np

    content = np.memmap(path, dtype=np.uint8, mode="r")
    for tensor in read_header(path):
        if tensor.dtype in _EXPONENTS:
            integers, mask = _EXPONENTS[tensor.dtype]
            values = content[tensor.start : tensor.end].view(integers)
            exponent = np.asarray(mask, dtype=integers)
            if bool(np.any((values & exponent) == exponent)):
                yield tensor.name
