"""Time of the planner: plans, refusals and a sweep, on one core.

    python -m benchmarks.planning

Exits with 1 if one takes longer than its bar.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from contextlib import suppress
from typing import Any

from benchmarks.machine import machine
from qwen3ft.config import TrainingConfig
from qwen3ft.errors import InsufficientMemoryError
from qwen3ft.planning.fit import choose
from qwen3ft.planning.gpu_specs import require_gpu_spec
from qwen3ft.planning.what_if import described_machine, shape_request, sweep_model
from qwen3ft.planning.workload import TYPICAL_FILL


def plan(gpu: str, **wanted: Any) -> Callable[[], None]:
    """Return a function that makes a plan, or refuses to."""

    def run() -> None:
        here = described_machine(require_gpu_spec(gpu))
        with suppress(InsufficientMemoryError):
            choose(shape_request(TrainingConfig(**wanted), here))

    return run


def sweep() -> None:
    """Plan every budget and length of one model on one GPU."""
    gpu = require_gpu_spec("rtx 4090")
    sweep_model(TrainingConfig(model_name="8b"), described_machine(gpu), gpu, TYPICAL_FILL)


MEASURES: dict[str, tuple[Callable[[], None], float]] = {
    "a plan, 14B, 2,048 tokens, 24 GB": (
        plan("h200", model_name="14b", max_sequence_length=2048, max_memory_gb=24.0),
        2.0,
    ),
    "a refusal, 14B, 2,048 tokens, 9 GB": (
        plan("h200", model_name="14b", max_sequence_length=2048, max_memory_gb=9.0),
        5.0,
    ),
    "a refusal, 4B, 32,768 tokens, 4.5 GB": (
        plan("h200", model_name="4b", max_sequence_length=32768, max_memory_gb=4.5),
        5.0,
    ),
    "a sweep, 8B on an RTX 4090": (sweep, 6.0),
}
"""What is timed, and the most CPU seconds that it may take."""


def main() -> int:
    """Measure and print; return 1 if a bar is missed."""
    print(f"{machine()['date']}, CPU seconds")
    missed = 0
    for name, (work, most_seconds) in MEASURES.items():
        started = time.process_time()
        work()
        seconds = time.process_time() - started
        missed += seconds > most_seconds
        print(f"{name:40} {seconds:5.2f}  (at most {most_seconds:g})")
    return int(missed > 0)


if __name__ == "__main__":
    sys.exit(main())
