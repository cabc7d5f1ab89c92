"""A training that fills its budget, in this process: where the allocator's memory goes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from benchmarks.scaling.training import plan_for, speeds_of
from qwen3ft.jobs.folders import RunDir
from qwen3ft.units import GIB, MIB

LEAST_HOLE_BYTES = MIB
MOST_HOLES = 24


def tight(values: dict[str, Any]) -> dict[str, Any]:
    """Train with segments of so many MB; return the allocator's peaks, or its holes if it failed.

    Expandable segments grow and shrink by whole segments, 20 MB each by default, so each hole
    between tensors may keep nearly as much from being used.
    """
    import torch

    from qwen3ft.worker import jobs as worker

    plan = plan_for(values)
    set_allocator, segment_mb = torch._C._accelerator_setAllocatorSettings, values["segment_mb"]

    def set_with_segments(settings: str) -> None:
        set_allocator(f"{settings},large_segment_size_mb:{segment_mb}")

    torch._C._accelerator_setAllocatorSettings = set_with_segments
    job = RunDir(Path(plan.run_dir)).attempt(1).create(plan)
    found: dict[str, Any] = {"memory": plan.memory.model_dump(mode="json"), "ended": True}
    try:
        outcome = worker.train_job(worker.Job(job.path))
    except torch.OutOfMemoryError as error:
        found |= {"ended": False, "message": str(error)[:400], **holes()}
    else:
        found |= {"process_gb": outcome.peak_memory_gb}
    found |= speeds_of(job, plan)
    if torch.cuda.is_available():
        found["allocated_gb"] = torch.cuda.max_memory_allocated() / GIB
        found["reserved_gb"] = torch.cuda.max_memory_reserved() / GIB
        found["retries"] = torch.cuda.memory_stats()["num_alloc_retries"]
    return found


def holes() -> dict[str, Any]:
    """Return the free blocks between tensors now, in MiB, largest first, by segment."""
    import torch

    segments = []
    for segment in torch.cuda.memory_snapshot():
        free = [b["size"] for b in segment["blocks"] if b["state"] == "inactive"]
        large = sorted((size for size in free if size >= LEAST_HOLE_BYTES), reverse=True)
        segments.append(
            {
                "type": segment["segment_type"],
                "mib": segment["total_size"] / MIB,
                "free_mib": sum(free) / MIB,
                "holes_mib": [round(size / MIB, 1) for size in large[:MOST_HOLES]],
            }
        )
    return {"segments": segments}
