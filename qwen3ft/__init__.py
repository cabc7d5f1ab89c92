"""Fine-tune Qwen3 with QLoRA inside a memory budget: the library, with no Prefect in it.

The public names are imported on first use, so that `python -m qwen3ft.environment` can set up a
machine that has nothing but Python, and the flow's process never loads torch.
"""

from __future__ import annotations

from importlib import import_module
from typing import Any

_HOMES = {
    "DataPipeline": "data",
    "EnvironmentManager": "environment",
    "InferenceTester": "inference",
    "LoRAAdapter": "lora",
    "MemoryOptimizer": "memory",
    "MemoryStatus": "records",
    "ModelManager": "model",
    "TrainPlan": "records",
    "TrainingConfig": "config",
    "TrainingEngine": "train",
    "TrainingMetrics": "records",
    "load_config": "config",
}

__all__ = sorted(_HOMES)


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"qwen3ft.{_HOMES[name]}"), name)
