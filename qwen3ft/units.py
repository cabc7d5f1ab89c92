"""Sizes of memory and files: GB means 2**30 bytes throughout, MiB 2**20."""

from __future__ import annotations

GIB, MIB = 2**30, 2**20


def gb(size_bytes: float) -> float:
    """Return a size in GB."""
    return size_bytes / GIB


def size_text(size_bytes: float, digits: int = 2) -> str:
    """Return a size in GB as text for people: `12.34 GB`."""
    return f"{size_bytes / GIB:.{digits}f} GB"
