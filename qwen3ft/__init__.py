"""Fine-tune Qwen3 with QLoRA inside a memory budget.

`finetune` does all of it; docs/python.md shows that and the parts. Public names are imported on
first use, so that `python -m qwen3ft.machine.environment` can set up a machine that has nothing but
Python, and the flow's process never loads torch.
"""

from __future__ import annotations

from importlib import import_module
from typing import Any

_HOMES = {
    "config": ("TrainingConfig", "load_config"),
    "data.pipeline": ("DataPipeline",),
    "data.token_table": ("load_split",),
    "entry_points": ("Run", "finetune", "open_chat", "project"),
    "errors": (
        *("FinetuneError",),
        *("OutOfMemoryError", "InsufficientMemoryError", "MemoryLeakError"),
        *("ModelNotFoundError", "QuantizationError", "TokenizerError"),
        *("TrainingFailureError", "DataLoadingError", "SaveError"),
    ),
    "evaluation.inference": ("InferenceTester",),
    "jobs.folders": ("JobDir",),
    "machine.environment": ("EnvironmentManager",),
    "machine.memory": ("MemoryOptimizer",),
    "model.adapter": ("LoRAAdapter",),
    "model.manager": ("ModelManager",),
    "model.save_adapter": ("save_adapter",),
    "operations.preview": ("preview_plan",),
    "records.plan": ("TrainPlan",),
    "records.requests": ("ExportLimits",),
    "records.training": ("MemoryStatus", "TrainingMetrics"),
    "registry.lookup": ("find_adapter",),
    "registry.moves": ("Change", "this_person"),
    "registry.registry": ("Registry",),
    "serving.export": ("export_adapter", "find_held_out"),
    "tracking.uri": ("default_tracking_uri",),
    "training.engine": ("TrainingEngine",),
}
__version__: str
_HOME_OF = {name: module for module, names in _HOMES.items() for name in names}

__all__ = sorted(_HOME_OF)


def __getattr__(name: str) -> Any:
    if name == "__version__":
        from importlib.metadata import version

        return version("qwen3ft")
    if name not in _HOME_OF:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"qwen3ft.{_HOME_OF[name]}"), name)
