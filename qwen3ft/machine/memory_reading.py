"""Memory at the end of a step, in the numbers that grow if something leaks.

Resident memory is counted without pages of files (Linux): a data set that is mapped and read for
the first time, or a library's code, is no growth of ours, and the system takes such pages back.
Cost of one reading: 10 to 20 microseconds on a CPU; on a GPU torch's counters besides, which are
read without waiting for the device.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

_OWN_PAGES = Path("/proc/self/statm")


@dataclass(frozen=True)
class MemoryReading:
    """One reading; the counters of torch's allocator are 0 on a CPU.

    Attributes:
        step: The optimizer step that just ended.
        private_bytes: Resident memory that no file backs.
        allocated_bytes: In use by tensors on the GPU.
        peak_allocated_bytes: The highest so far, within steps and evaluations.
        reserved_bytes: Held by the allocator.
        inactive_bytes: Held and not in use, in parts of segments: what may be too scattered to use.
        retries: How often the allocator had to give its cache back before it got memory.
    """

    step: int
    private_bytes: int
    allocated_bytes: int = 0
    peak_allocated_bytes: int = 0
    reserved_bytes: int = 0
    inactive_bytes: int = 0
    retries: int = 0

    @property
    def fragmentation_share(self) -> float:
        """Share of what is held that is in unused parts of segments."""
        return self.inactive_bytes / self.reserved_bytes if self.reserved_bytes else 0.0


def read_memory(step: int, device: Literal["cuda", "cpu"]) -> MemoryReading:
    """Memory at this moment."""
    if device == "cpu":
        return MemoryReading(step, private_bytes())
    import torch

    return of_allocator(step, private_bytes(), torch.cuda.memory_stats())


def of_allocator(step: int, private: int, statistics: dict[str, Any]) -> MemoryReading:
    """The reading that `torch.cuda.memory_stats()` gives; what a backend does not count is 0."""
    return MemoryReading(
        step=step,
        private_bytes=private,
        allocated_bytes=statistics.get("allocated_bytes.all.current", 0),
        peak_allocated_bytes=statistics.get("allocated_bytes.all.peak", 0),
        reserved_bytes=statistics.get("reserved_bytes.all.current", 0),
        inactive_bytes=statistics.get("inactive_split_bytes.all.current", 0),
        retries=statistics.get("num_alloc_retries", 0),
    )


def private_bytes() -> int:
    """Resident memory of this process less pages of files; all of it where the system won't say."""
    if _OWN_PAGES.exists():
        resident, shared = _OWN_PAGES.read_text(encoding="ascii").split()[1:3]
        return (int(resident) - int(shared)) * os.sysconf("SC_PAGE_SIZE")
    import psutil

    return int(psutil.Process().memory_info().rss)


def free_host_bytes() -> int:
    """What the system can still give to processes."""
    import psutil

    return int(psutil.virtual_memory().available)
