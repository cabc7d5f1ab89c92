"""Units of memory. Sizes called GB are 2**30 bytes."""

from __future__ import annotations

MIB = 2**20
GIB = 2**30
"""Bytes in one GB as this project counts it."""
