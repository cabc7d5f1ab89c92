"""The files that make a saved adapter's folder a model of MLflow's flavor `python_function`.

They only name `qwen3ft.entry_points` as what loads the folder, with the columns that go in and
come out. Nothing is pickled, the base model is not in it, and MLflow itself is not needed.
"""

from __future__ import annotations

import json
import platform
from pathlib import Path
from typing import Any

from qwen3ft.disk.files import write_json_atomic

MLMODEL_FILE, EXAMPLE_FILE = "MLmodel", "input_example.json"

QUESTION, ANSWER, THINKS = "question", "answer", "enable_thinking"
"""Columns in and out, and a parameter."""

_EXAMPLE = {"columns": [QUESTION], "data": [["What can you help me with?"]]}


def write_mlflow_files(folder: Path, provenance: dict[str, Any], *, thinking: bool) -> None:
    """Write MLmodel and the input example into the folder of an adapter.

    Args:
        folder: The adapter's.
        provenance: What it was trained from.
        thinking: True if it was trained to think first, the default of the parameter.
    """
    base = provenance["base"]
    write_json_atomic(folder / EXAMPLE_FILE, _EXAMPLE)
    description = {  # JSON is YAML, which MLflow reads here
        "flavors": {
            "python_function": {
                "loader_module": "qwen3ft.entry_points",
                "python_version": platform.python_version(),
            }
        },
        "metadata": {
            "run": provenance["run_id"],
            "base_model": base["model_name"],
            "base_revision": base["revision"],
            "quantization": base["quantization"],
        },
        "signature": {
            "inputs": json.dumps([{"name": QUESTION, "type": "string", "required": True}]),
            "outputs": json.dumps([{"name": ANSWER, "type": "string", "required": True}]),
            "params": json.dumps(
                [{"name": THINKS, "type": "boolean", "default": thinking, "shape": None}]
            ),
        },
        "saved_input_example_info": {
            "artifact_path": EXAMPLE_FILE,
            "type": "dataframe",
            "pandas_orient": "split",
        },
    }
    write_json_atomic(folder / MLMODEL_FILE, description)
