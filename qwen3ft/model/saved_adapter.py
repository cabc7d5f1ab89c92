"""The folder of a saved adapter: its file names, reading it back, and checks before it is used.

    <output_dir>/<run_id>/
      adapter_model.safetensors  adapter_config.json   as PEFT writes them
      tokenizer.json  tokenizer_config.json  chat_template.jinja
      provenance.json                                  base, data, settings and results of the run
      known_rows.npy                                   hashes of the rows that it was trained on
      README.md                                        the model card
      manifest.json                                    written last: sha256 of every file

`qwen3ft.model.save_adapter` writes it. Safetensors files are read by header and raw bytes here.
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
PROVENANCE_FILE = "provenance.json"
_OLD_PROVENANCE_FILE = "run_card.json"  # in adapters registered earlier; read for one release
KNOWN_ROWS_FILE = "known_rows.npy"
TOKENIZER_FILES = (
    *("tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "special_tokens_map.json"),
)

_EXPONENTS = {"F64": ("<u8", 0x7FF0 << 48), "F32": ("<u4", 0x7F800000), "F16": ("<u2", 0x7C00)}
_EXPONENTS["BF16"] = ("<u2", 0x7F80)
"""Integer type and exponent bits of each dtype: in IEEE 754 a value is infinite or NaN exactly if
all of these are set. Raw integers work for bfloat16 too, which numpy lacks."""


@dataclass(frozen=True)
class Tensor:
    """Place of one tensor in a safetensors file; offsets in bytes from the start of the file."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    start: int
    end: int


def check_adapter(folder: Path) -> None:
    """Raise unless `folder` is a saved adapter whose files are those that were saved.

    Raises:
        ModelNotFoundError: a file of a saved adapter is missing.
        SaveError: a file differs from the manifest.
    """
    names = (ADAPTER_FILE, ADAPTER_CONFIG_FILE)
    missing = [name for name in names if not (folder / name).is_file()]
    if not has_provenance(folder):
        missing.append(PROVENANCE_FILE)
    if missing:
        raise ModelNotFoundError(
            f"{folder} is not a saved adapter: {', '.join(missing)} missing.",
            why="A saved adapter is a folder that a run wrote below output_dir.",
            next_command=f"ls {folder.parent}",
            path=str(folder),
        )
    if damage := find_damage(folder):
        raise SaveError(
            f"The adapter in {folder} is damaged: {damage}.",
            why="Its files differ from those that were saved and verified.",
            next_command="qwen3ft status",
            path=str(folder),
        )


def has_provenance(folder: Path) -> bool:
    """Return True if `folder` looks like a saved adapter; `check_adapter` makes sure."""
    return any((folder / name).is_file() for name in (PROVENANCE_FILE, _OLD_PROVENANCE_FILE))


def read_provenance(folder: Path) -> dict[str, Any]:
    """Read what the adapter in `folder` was trained from, with what settings and result."""
    path = folder / PROVENANCE_FILE
    if not path.is_file():
        path = folder / _OLD_PROVENANCE_FILE
    provenance: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return provenance


def was_trained_to_think(provenance: dict[str, Any]) -> bool:
    """Return True if most training rows had reasoning."""
    data: dict[str, Any] = provenance["data"]
    if "reasoning_rows" not in data:  # written by an earlier version
        return provenance["config"].get("reasoning_separator") is not None
    return 2 * int(data["reasoning_rows"]) > int(data["usable_rows"])


def read_degradations(folder: Path) -> tuple[str, ...]:
    """Return where the run that saved `folder` fell short of its request; usually nothing."""
    if not has_provenance(folder):
        return (f"its {PROVENANCE_FILE} is missing",)
    return tuple(read_provenance(folder).get("degraded", ()))


def find_base(folder: Path) -> str:
    """Return the folder of the 4-bit snapshot that the adapter was trained on.

    Raises:
        ModelUnavailableError: it is gone, or another one lies in its place.
    """
    base = read_provenance(folder)["base"]
    snapshot = Path(base["snapshot_path"])
    if not (snapshot / MANIFEST_NAME).is_file():
        problem = f"is not at {snapshot}"
    elif not _same_origin(read_manifest_facts(snapshot), base):
        problem = f"at {snapshot} is not the one that the adapter was trained on"
    else:
        # The same revision quantised again is accepted: other library versions write other bytes.
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
    """Return True if a snapshot's manifest has the revision and quantisation of `base`."""
    source = facts.get("source", {})
    found = (source.get("revision"), facts.get("quantization"))
    return found == (base["revision"], base["quantization"])


def read_header(path: Path) -> list[Tensor]:
    """Read the tensors of a safetensors file (8 bytes of length, JSON header, data).

    Raises:
        ValueError: the file has another format.
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
    """Yield the names of the tensors in a safetensors file that hold an infinity or a NaN."""
    import numpy as np

    content = np.memmap(path, dtype=np.uint8, mode="r")
    for tensor in read_header(path):
        if tensor.dtype in _EXPONENTS:
            integers, mask = _EXPONENTS[tensor.dtype]
            values = content[tensor.start : tensor.end].view(integers)
            exponent = np.asarray(mask, dtype=integers)
            if bool(np.any((values & exponent) == exponent)):
                yield tensor.name
