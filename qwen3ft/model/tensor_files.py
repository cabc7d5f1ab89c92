"""Safetensors files, read by header and raw bytes: what is in them, before any library reads it.

A file is 8 bytes of length, a JSON header, and the tensors one after the other.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qwen3ft.disk.files import MOST_JSON_BYTES, open_regular

DTYPE_BYTES = {
    **dict.fromkeys(("BOOL", "U8", "I8", "F8_E5M2", "F8_E4M3"), 1),
    **dict.fromkeys(("I16", "U16", "F16", "BF16"), 2),
    **dict.fromkeys(("I32", "U32", "F32"), 4),
    **dict.fromkeys(("I64", "U64", "F64"), 8),
}
"""Bytes of one value by the dtype's name in a header."""

MOST_NAME_CHARACTERS = 256
BLOCK_VALUES = 2**20


@dataclass(frozen=True)
class Tensor:
    """Place of one tensor in a safetensors file; offsets in bytes from the start of the file."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    start: int
    end: int


def read_header(path: Path) -> list[Tensor]:
    """Read the tensors of a safetensors file, in the order of their places.

    They fill the file exactly: none overlaps another, and nothing lies between or after them.

    Raises:
        ValueError: the file has another format.
    """
    with os.fdopen(open_regular(path), "rb") as stream:
        size_bytes = os.fstat(stream.fileno()).st_size
        length = int.from_bytes(stream.read(8), "little")
        if not 2 <= length <= min(size_bytes - 8, MOST_JSON_BYTES):
            raise ValueError(f"{path.name!a} has {size_bytes} bytes, but a header of {length}")
        content = stream.read(length)
    try:
        header = json.loads(content, object_pairs_hook=_unique)
        header.pop("__metadata__", None)
        tensors = [_tensor(name, entry, 8 + length) for name, entry in header.items()]
    except (AttributeError, KeyError, TypeError, UnicodeDecodeError, RecursionError) as error:
        reason = type(error).__name__
        raise ValueError(f"{path.name!a} has no header of tensors ({reason})") from error
    tensors.sort(key=lambda tensor: (tensor.start, tensor.end))
    end = 8 + length
    for tensor in tensors:
        if tensor.start != end:
            raise ValueError(f"{tensor.name!a} begins at byte {tensor.start} instead of {end}")
        end = tensor.end
    if end != size_bytes:
        raise ValueError(f"{path.name!a} has {size_bytes} bytes instead of {end}")
    return tensors


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    values = dict(pairs)
    if len(values) != len(pairs):
        raise ValueError("the header has a name twice")
    return values


def _tensor(name: str, entry: dict[str, Any], data_start: int) -> Tensor:
    if not 0 < len(name) <= MOST_NAME_CHARACTERS:
        raise ValueError(f"a tensor has a name of {len(name)} characters")
    dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if dtype not in DTYPE_BYTES:
        raise ValueError(f"{name!a} has the unknown dtype {str(dtype)[:40]!a}")
    if not _are_counts(shape) or not _are_counts(offsets) or len(offsets) != 2:
        raise ValueError(f"{name!a} has no shape or no place")
    start, end = offsets
    if end - start != math.prod(shape) * DTYPE_BYTES[dtype]:
        raise ValueError(f"{name!a} has {end - start} bytes, which is not its shape times {dtype}")
    return Tensor(name, dtype, tuple(shape), data_start + start, data_start + end)


def _are_counts(values: Any) -> bool:
    # Eight dimensions of 2**64 values are beyond any tensor, and quickly multiplied.
    return (
        isinstance(values, list)
        and len(values) <= 8
        and all(type(value) is int and 0 <= value < 2**64 for value in values)
    )


def find_wild_values(path: Path, tensors: Sequence[Tensor], largest: float) -> Iterator[str]:
    """Yield the names of F32 tensors with a NaN, or a value beyond `largest` either way."""
    import numpy as np

    content = np.memmap(path, dtype=np.uint8, mode="r")
    for tensor in tensors:
        values = content[tensor.start : tensor.end].view("<f4")
        blocks = (values[at : at + BLOCK_VALUES] for at in range(0, len(values), BLOCK_VALUES))
        # Compared so that NaN, which is not equal to anything, fails too.
        if not all(bool(np.all(np.abs(block) <= largest)) for block in blocks):
            yield tensor.name
