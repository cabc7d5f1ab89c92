"""A saved adapter of the embedded model, written without torch: to be registered, and harmed."""

from __future__ import annotations

import json
import struct
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from qwen3ft.disk.files import sha256_file, write_json_atomic
from qwen3ft.disk.manifests import write_manifest
from qwen3ft.embedded import MODEL_DIR
from qwen3ft.model.adapter_checks import ADAPTER_CONFIG_FILE, ADAPTER_FILE, tensor_name
from qwen3ft.model.saved_adapter import PROVENANCE_FILE
from qwen3ft.model.shapes import count_adapter_parameters, read_shape
from qwen3ft.records.model import PROJECTIONS, SavedAdapter

RANK, ALPHA = 1, 2
DTYPES = {"float64": "F64", "float32": "F32", "float16": "F16", "int32": "I32"}


def write_small_adapter(
    folder: Path,
    run: str = "night-0",
    degraded: tuple[str, ...] = (),
    model_name: str = "embedded",
) -> SavedAdapter:
    """Write what the run saves; runs of other names have other weights."""
    folder.mkdir(parents=True, exist_ok=True)
    write_tensors(folder / ADAPTER_FILE, small_tensors(run))
    write_json_atomic(folder / ADAPTER_CONFIG_FILE, small_settings(model_name))
    write_json_atomic(folder / PROVENANCE_FILE, small_provenance(run, degraded, model_name))
    write_manifest(folder)
    return SavedAdapter(
        path=str(folder),
        sha256=sha256_file(folder / ADAPTER_FILE),
        size_bytes=(folder / ADAPTER_FILE).stat().st_size,
        model_name=model_name,
        degraded=degraded,
    )


def small_tensors(run: str = "night-0") -> dict[str, np.ndarray]:
    """Return A and B of all projections, drawn from a seed that is the name of the run."""
    draw, shape = np.random.default_rng(list(run.encode())), read_shape(MODEL_DIR)
    tensors = {}
    for layer in range(shape.num_hidden_layers):
        for projection, (out, inp) in shape.projection_sizes().items():
            for part, size in (("A", (RANK, inp)), ("B", (out, RANK))):
                values = draw.normal(size=size).astype(np.float32)
                tensors[tensor_name(layer, projection, part)] = values
    return tensors


def write_tensors(path: Path, tensors: Mapping[str, np.ndarray]) -> None:
    """Write a safetensors file."""
    header, contents, start = {}, [], 0
    for name, values in tensors.items():
        content = values.tobytes()
        header[name] = {
            "dtype": DTYPES[values.dtype.name],
            "shape": list(values.shape),
            "data_offsets": [start, start + len(content)],
        }
        contents.append(content)
        start += len(content)
    text = json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + b"".join(contents))


def small_settings(model_name: str = "embedded") -> dict[str, Any]:
    """Return the settings that PEFT writes, with the original model in them."""
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": model_name,
        "revision": "0" * 64,
        "inference_mode": True,
        "r": RANK,
        "lora_alpha": ALPHA,
        "lora_dropout": 0.0,
        "target_modules": list(PROJECTIONS),
        "bias": "none",
        "use_dora": False,
        "modules_to_save": None,
        "rank_pattern": {},
    }


def small_provenance(
    run: str = "night-0", degraded: tuple[str, ...] = (), model_name: str = "embedded"
) -> dict[str, Any]:
    """Return the provenance that goes with it."""
    shape = read_shape(MODEL_DIR)
    return {
        "run_id": run,
        "base": {
            "model_name": model_name,
            "revision": "0" * 64,
            "local_path": None,
            "snapshot_path": "/nowhere/snapshot",
            "snapshot_manifest_sha256": "1" * 64,
            "quantization": "nf4-double",
            "compute_dtype": "float32",
        },
        "data": {"digest": "3" * 64, "sources": []},
        "plan": {
            "adapter": {
                "r": RANK,
                "alpha": ALPHA,
                "dropout": 0.0,
                "target_modules": list(PROJECTIONS),
                "trainable_parameters": count_adapter_parameters(shape, RANK),
                "total_parameters": shape.total_parameters,
            }
        },
        "config": {"max_new_tokens": 16},
        "degraded": list(degraded),
    }
