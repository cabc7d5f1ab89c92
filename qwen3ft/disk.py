"""Whether a folder has the room for what is about to be written into it."""

from __future__ import annotations

import shutil
from pathlib import Path

from qwen3ft.errors import EnvironmentNotReadyError
from qwen3ft.records.plan import GIB


def require_disk(target: Path, needed_bytes: int, what: str, why: str) -> None:
    """Make the parent of `target` and see that it has `needed_bytes` free.

    Args:
        target: What will be written.
        needed_bytes: How much at most.
        what: Its name, to begin a sentence with.
        why: What the reader should know beside the numbers.

    Raises:
        EnvironmentNotReadyError: less is free; its facts have both numbers, in bytes.
    """
    target.parent.mkdir(parents=True, exist_ok=True)
    free_bytes = shutil.disk_usage(target.parent).free
    if free_bytes < needed_bytes:
        raise EnvironmentNotReadyError(
            f"{what} needs {needed_bytes / GIB:.2f} GB at {target.parent}, "
            f"{free_bytes / GIB:.2f} GB are free.",
            why=why,
            next_command=f"df -h {target.parent}",
            needed_bytes=needed_bytes,
            free_bytes=free_bytes,
        )
