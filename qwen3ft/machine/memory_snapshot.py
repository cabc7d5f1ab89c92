"""What memory was full of, left in the attempt's folder for a person and for MLflow.

    memory/peak.json         the step that set the highest peak and the counters at its end; on disk
                             as soon as it is known, so that it survives any kind of death
    memory/resident.txt      resident memory by class of mapping
    memory/summary.txt       torch's own summary of its allocator (GPU)
    memory/segments.json.gz  segments and blocks, bounded (GPU)
    memory/segments.html     the same as a picture without scripts (GPU)

Cost by default: nothing but a few counters at the ends of steps; the rest is written once, when an
attempt fails for memory or, on a GPU, ends. `memory_history: true` has the allocator note where
each block comes from, for the last `HISTORY_EVENTS` events: about 2 microseconds each. No pickle
anywhere.

Not covered: a process that is killed or that a library ends leaves peak.json alone.
"""

from __future__ import annotations

import gzip
import json
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any, Literal

from qwen3ft.files import write_bytes_atomic
from qwen3ft.logs import get_logger, mask_secrets
from qwen3ft.machine.memory_report import read_resident
from qwen3ft.machine.process_memory import MemoryReading
from qwen3ft.machine.segments import as_json, live_at_peak, read_segments
from qwen3ft.machine.segments_page import segments_page

logger = get_logger("memory")

HISTORY_EVENTS = 100_000
PEAK_STEP_SHARE = 1.02
"""A new peak is written when it is this much above the last one written."""


def record_history() -> None:
    """Have torch's allocator note where blocks come from, in a ring of `HISTORY_EVENTS`."""
    import torch

    torch.cuda.memory._record_memory_history(
        "all", context="alloc", stacks="python", max_entries=HISTORY_EVENTS
    )


class PeakKeeper:
    """Keeps the counters of the step that set the peak in memory/peak.json."""

    def __init__(self, folder: Path, device: Literal["cuda", "cpu"]) -> None:
        self.path = folder / "peak.json"
        self.device = device
        self._written_bytes = 0.0

    def see(self, reading: MemoryReading) -> None:
        """Write `reading` if it is a new peak."""
        on_gpu = self.device == "cuda"
        peak_bytes = reading.peak_allocated_bytes if on_gpu else reading.private_bytes
        if peak_bytes <= PEAK_STEP_SHARE * self._written_bytes:
            return
        self._written_bytes = peak_bytes
        self.path.parent.mkdir(exist_ok=True)
        values = {**asdict(reading), "fragmentation_share": round(reading.fragmentation_share, 4)}
        # A file is enough: what a power cut takes here is told again at the next peak.
        self.path.write_text(json.dumps(values, indent=2) + "\n", encoding="utf-8")


def write_report(folder: Path, why: str) -> None:
    """Write what memory is full of at this moment into `folder`; never in the way of a failure.

    Args:
        folder: `JobDir.memory_report`.
        why: What happened, for the headline.
    """
    try:
        folder.mkdir(exist_ok=True)
        _write_text(folder / "resident.txt", f"{mask_secrets(why)}\n\n{read_resident()}")
        torch: Any = sys.modules.get("torch")
        if torch is not None and torch.cuda.is_available() and torch.cuda.is_initialized():
            _write_text(folder / "summary.txt", torch.cuda.memory_summary())
            write_segments(folder, why, torch.cuda.memory._snapshot())
    except (OSError, RuntimeError, MemoryError) as error:
        logger.warning("no report on memory: %s: %s", type(error).__name__, error)


def write_segments(folder: Path, why: str, snapshot: dict[str, Any]) -> None:
    """segments.json.gz and segments.html of what `torch.cuda.memory._snapshot()` gives."""
    segments = read_segments(snapshot["segments"])
    trace = [event for events in snapshot.get("device_traces", ()) for event in events]
    peak = live_at_peak(segments, trace)
    content = json.dumps(as_json(segments, peak), separators=(",", ":")).encode()
    write_bytes_atomic(folder / "segments.json.gz", gzip.compress(content, mtime=0))
    page = segments_page("Memory of the GPU", mask_secrets(why), segments, peak)
    _write_text(folder / "segments.html", page)


def _write_text(path: Path, text: str) -> None:
    write_bytes_atomic(path, text.encode())
