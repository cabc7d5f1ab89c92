"""Files that show what filled the memory of an attempt, for a person and for MLflow.

    memory/peak.json        counters at the step with the highest peak; written as it is reached
    memory/resident.txt     resident memory of the process, from psutil
    memory/summary.txt      `torch.cuda.memory_summary()` (GPU)
    memory/snapshot.pickle  torch's snapshot of its allocator, for pytorch.org/memory_viz (GPU)

Everything but peak.json is written once: when an attempt fails for memory or, on a GPU, ends. A
process that is killed leaves peak.json alone.
"""

from __future__ import annotations

import json
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any, Literal

from qwen3ft.disk.files import write_bytes_atomic
from qwen3ft.logs import get_logger, mask_secrets
from qwen3ft.machine.process_memory import MemoryReading
from qwen3ft.units import MIB

logger = get_logger("memory")

HISTORY_EVENTS = 100_000
"""Events that `record_history` keeps; recording one with its stack takes about 2 microseconds."""

PEAK_STEP_SHARE = 1.02
"""Write a new peak when it exceeds the last one written by this factor."""


def record_history() -> None:
    """Have torch's allocator record the Python stack of its last `HISTORY_EVENTS` events."""
    import torch

    torch.cuda.memory._record_memory_history(
        "all", context="alloc", stacks="python", max_entries=HISTORY_EVENTS
    )


class PeakRecorder:
    """Recorder of the step with the highest peak, in `folder`/peak.json."""

    def __init__(self, folder: Path, device: Literal["cuda", "cpu"]) -> None:
        self.path = folder / "peak.json"
        self.device = device
        self._written_bytes = 0.0

    def add(self, reading: MemoryReading) -> None:
        """Write `reading` if it is a new peak."""
        on_gpu = self.device == "cuda"
        peak_bytes = reading.peak_allocated_bytes if on_gpu else reading.private_bytes
        if peak_bytes <= PEAK_STEP_SHARE * self._written_bytes:
            return
        self._written_bytes = peak_bytes
        self.path.parent.mkdir(exist_ok=True)
        # Not atomic: an fsync would stall the step, and the next peak replaces a torn file.
        self.path.write_text(json.dumps(asdict(reading), indent=2) + "\n", encoding="utf-8")


def write_memory_report(folder: Path, why: str) -> None:
    """Write what fills memory now into `folder` (`JobDir.memory_report`).

    Logs a warning instead of raising, because it runs while another error is being handled.

    Args:
        folder: Made if it is missing; its parent must exist.
        why: What happened; the first line of resident.txt.
    """
    try:
        folder.mkdir(exist_ok=True)
        resident = f"{mask_secrets(why)}\n\n{resident_text()}"
        write_bytes_atomic(folder / "resident.txt", resident.encode())
        torch: Any = sys.modules.get("torch")
        if torch is not None and torch.cuda.is_available() and torch.cuda.is_initialized():
            write_bytes_atomic(folder / "summary.txt", torch.cuda.memory_summary().encode())
            torch.cuda.memory._dump_snapshot(str(folder / "snapshot.pickle"))
    except (OSError, RuntimeError, MemoryError) as error:
        logger.warning("no report on memory: %s: %s", type(error).__name__, error)


def resident_text() -> str:
    """Return psutil's totals for this process, one line for each that the system reports."""
    import psutil

    info = psutil.Process().memory_full_info()
    sizes = {name: getattr(info, name, None) for name in ("rss", "uss", "pss", "shared", "swap")}
    lines = [f"{n:>10} {size / MIB:10,.1f} MiB" for n, size in sizes.items() if size is not None]
    return "\n".join(["Resident memory of the process", "", *lines]) + "\n"
