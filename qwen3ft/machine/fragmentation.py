"""Tells a GPU allocator that was fine and now keeps giving its cache back. Pure.

When torch's allocator finds no piece that is large enough it frees its cache and asks again
(`num_alloc_retries`); each time the GPU is waited for. A plan that fills its budget may retry from
the start, and a fresh process would not change that. One that ran `CLEAN_READINGS` without a retry
and then needs one in most of the last `WINDOW` readings has been worn out: free memory is there, in
pieces that are too small. Readings are at the ends of steps.

Not covered: fragmentation that no retry shows, which costs nothing but what the allocator holds.
"""

from __future__ import annotations

from collections import deque

from qwen3ft.errors import MemoryLeakError
from qwen3ft.machine.process_memory import MemoryReading

WINDOW = 32
CLEAN_READINGS = 256
LEAST_SHARE_WITH_RETRIES = 0.5
LEAST_FRAGMENTATION = 0.2


class FragmentationDetector:
    """Fed with readings in the order of the steps."""

    def __init__(self) -> None:
        self._retries: int | None = None
        self._recent: deque[bool] = deque(maxlen=WINDOW)
        self._clean = 0
        self._was_clean = False
        self._since_step = 0

    def add(self, reading: MemoryReading) -> None:
        """Take a reading."""
        retried = self._retries is not None and reading.retries > self._retries
        self._retries = reading.retries
        if retried and self._clean >= CLEAN_READINGS:
            self._was_clean, self._since_step = True, reading.step
        self._clean = 0 if retried else self._clean + 1
        self._recent.append(retried)

    def worn_out(self, reading: MemoryReading) -> bool:
        """Whether retries have become the rule, in memory that is there but scattered."""
        share = sum(self._recent) / WINDOW
        return (
            self._was_clean
            and share >= LEAST_SHARE_WITH_RETRIES
            and reading.fragmentation_share >= LEAST_FRAGMENTATION
        )

    def error(self, reading: MemoryReading) -> MemoryLeakError:
        """The error that ends an attempt for it."""
        return MemoryLeakError(
            f"The allocator gave its cache back in {sum(self._recent)} of the last {WINDOW} "
            f"readings, since step {self._since_step}: {reading.retries} retries, "
            f"{reading.fragmentation_share:.0%} of {reading.reserved_bytes / 2**30:.2f} GB held is "
            "in unused pieces.",
            why="GPU memory is fragmented; a fresh process starts with whole segments.",
            next_command="qwen3ft doctor",
            series="fragmentation",
            since_step=self._since_step,
            step=reading.step,
            retries=reading.retries,
            fragmentation_share=round(reading.fragmentation_share, 3),
        )
