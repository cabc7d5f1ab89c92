"""The flow's process stays small: what it calls between attempts loads no heavy library."""

from __future__ import annotations

import subprocess
import sys
from textwrap import dedent

HEAVY = {"torch", "transformers", "datasets", "prefect", "mlflow"}
PROGRAMS = {
    "the environment's report": """
        from qwen3ft.machine.environment import EnvironmentManager
        EnvironmentManager().report()
    """,
    "the lock of a GPU, and who uses one": """
        import qwen3ft.machine.gpu_lock, qwen3ft.recovery.shared_gpu
    """,
    "memory of a CPU": """
        from qwen3ft.machine.memory import MemoryOptimizer
        memory = MemoryOptimizer(4.0, "cpu")
        memory.optimize_for_training(); memory.status(); memory.peak(); memory.enforce_budget()
        memory.cleanup_gpu_memory()
    """,
    "whether data changed": """
        from qwen3ft.config import TrainingConfig
        from qwen3ft.data.folder import read_manifest
        from qwen3ft.data.pipeline import dataset_target
        from qwen3ft.data.sources import resolved
        resolved(TrainingConfig(model_name="embedded"))
    """,
    "translating a failure": "import qwen3ft.jobs.failures",
}


def test_nothing_heavy_is_loaded() -> None:
    """One process does it all, and looks after each part."""
    look = f"import sys; assert not {HEAVY!r} & sys.modules.keys()"
    parts = [f"{dedent(text).strip()}\n{look}, {name!r}" for name, text in PROGRAMS.items()]
    subprocess.run([sys.executable, "-c", "\n".join(parts)], check=True)
