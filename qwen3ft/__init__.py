"""Fine-tune Qwen3 with QLoRA inside a memory budget: the library, without Prefect.

Public names are imported on first use, so that `python -m qwen3ft.machine.environment` can set up a
machine that has nothing but Python, and the flow's process never loads torch.
"""

from __future__ import annotations

from importlib import import_module
from typing import Any

_HOMES = {
    "config": ("TrainingConfig", "load_config"),
    "data.pipeline": ("DataPipeline",),
    "errors": (
        *("OutOfMemoryError", "InsufficientMemoryError", "MemoryLeakError"),
        *("ModelNotFoundError", "QuantizationError", "TokenizerError"),
        *("TrainingFailureError", "DataLoadingError", "SaveError"),
    ),
    "evaluation.inference": ("InferenceTester",),
    "machine.environment": ("EnvironmentManager",),
    "machine.memory": ("MemoryOptimizer",),
    "model.adapter": ("LoRAAdapter",),
    "model.manager": ("ModelManager",),
    "records.plan": ("TrainPlan",),
    "records.training": ("MemoryStatus", "TrainingMetrics"),
    "training.engine": ("TrainingEngine",),
}
_HOME_OF = {name: module for module, names in _HOMES.items() for name in names}

__all__ = sorted(_HOME_OF)


def __getattr__(name: str) -> Any:
    if name not in _HOME_OF:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"qwen3ft.{_HOME_OF[name]}"), name)
