"""Quantise a GGUF file to llama.cpp's mixture Q4_K_M: 4 bits, and 6 where they matter most.

The numbers are made by ggml itself, in the library of `xllamacpp`, so the server that reads a file
has the code that wrote it. The program around it, `llama-quantize`, is in no package that installs
without a compiler; its choice of a type for each tensor of a dense model is repeated here
(`llama_tensor_get_type` in src/llama-quant.cpp).
"""

from __future__ import annotations

import ctypes
import re
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import numpy as np

LLAMA_FTYPE_Q4_K_M = 15
"""Value of `general.file_type`, by which programs name the mixture."""

_LAYER = re.compile(r"blk\.(\d+)\.")
_MORE_BITS = ("attn_v.weight", "ffn_down.weight")
_NARROW = {"Q4_K": "Q5_0", "Q6_K": "Q8_0"}
"""Types for rows that are no multiple of the 256 weights that K types quantise together."""


def quantise_q4_k_m(source: Path, target: Path) -> None:
    """Write the GGUF file `source`, in bfloat16, as Q4_K_M to the new file `target`.

    It takes memory for the largest tensor in fp32.
    """
    import gguf

    reader = gguf.GGUFReader(source)
    architecture = reader.fields["general.architecture"].contents()
    layers = reader.fields[f"{architecture}.block_count"].contents()
    tied = not any(tensor.name == "output.weight" for tensor in reader.tensors)
    writer = gguf.GGUFWriter(target, architecture)
    _copy_facts(reader, writer)
    for tensor in reader.tensors:
        if len(tensor.shape) == 1:  # norms: (channels,) in fp32
            writer.add_tensor(tensor.name, tensor.data)
            continue
        wanted = mixture_type(tensor.name, int(tensor.shape[0]), layers, tied=tied)
        kind = gguf.GGMLQuantizationType[wanted]
        weight = gguf.dequantize(tensor.data, tensor.tensor_type)
        writer.add_tensor(tensor.name, _quantise(weight, kind), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def mixture_type(name: str, columns: int, layers: int, *, tied: bool) -> str:
    """Return the type that Q4_K_M has for a matrix.

    Args:
        name: Name of the tensor in GGUF.
        columns: Length of its rows, the input channels.
        layers: Number of the model's layers.
        tied: True if the embedding is also the output matrix.
    """
    layer = _LAYER.match(name)
    is_output = name == "output.weight" or (tied and name == "token_embd.weight")
    matters = layer and name.endswith(_MORE_BITS) and _takes_more_bits(int(layer[1]), layers)
    wanted = "Q6_K" if is_output or matters else "Q4_K"
    return wanted if columns % 256 == 0 else _NARROW[wanted]


def _takes_more_bits(layer: int, layers: int) -> bool:
    """Return True for the first and last eighth of the layers, and for each third between them."""
    eighth = layers // 8
    return layer < eighth or layer >= 7 * layers // 8 or (layer - eighth) % 3 == 2


def _copy_facts(reader: Any, writer: Any) -> None:
    import gguf

    for field in reader.fields.values():
        # both are written by the writer itself
        if field.name.startswith("GGUF.") or field.name == "general.architecture":
            continue
        kind, *inner = field.types
        value = field.contents()
        if field.name == "general.file_type":
            value = LLAMA_FTYPE_Q4_K_M
        sub_type = inner[-1] if kind == gguf.GGUFValueType.ARRAY else None
        writer.add_key_value(field.name, value, kind, sub_type)


@cache
def _ggml() -> Any:
    """Return ggml's function that quantises rows.

    size_t ggml_quantize_chunk(type, const float * src, void * dst, int64_t start, int64_t rows,
    int64_t columns, const float * importance), of ggml.h; it returns the bytes written.
    """
    from xllamacpp import xllamacpp

    function = ctypes.CDLL(xllamacpp.__file__).ggml_quantize_chunk
    pointer, count = ctypes.c_void_p, ctypes.c_int64
    function.argtypes = [ctypes.c_int, pointer, pointer, count, count, count, pointer]
    function.restype = ctypes.c_size_t
    return function


def _quantise(weight: np.ndarray, kind: Any) -> np.ndarray:
    """Return a matrix (rows, columns) as the bytes of the type `kind`, (rows, bytes of a row)."""
    import gguf
    import numpy as np

    rows, columns = weight.shape
    weight = np.ascontiguousarray(weight, dtype=np.float32)
    packed = np.empty(gguf.quant_shape_to_byte_shape((rows, columns), kind), dtype=np.uint8)
    written = _ggml()(int(kind), weight.ctypes.data, packed.ctypes.data, 0, rows, columns, None)
    assert written == packed.nbytes
    return packed
