"""Units of memory. Sizes called GB are 2**30 bytes."""

from __future__ import annotations

GIB = 2**30
"""Bytes in one GB as this project counts it."""
