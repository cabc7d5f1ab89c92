"""What this process's resident memory consists of, by class of mapping, as a text for a person.

Read from the kernel's list of mappings (Linux), which takes some 10 ms: for failures, not for
steps. Elsewhere only the sums are told.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

MIB = 2**20
LARGEST_TOLD = 30


@dataclass(frozen=True)
class Mapping:
    """One mapping of the process, or all of one file."""

    path: str
    resident_bytes: int


def resident_text(totals: dict[str, int], mappings: Sequence[Mapping]) -> str:
    """Sums, then classes, then the largest mappings."""
    lines = ["Resident memory of the process (MiB = 2**20 bytes)", ""]
    lines += [f"{name:>10} {size / MIB:10,.1f} MiB" for name, size in totals.items()]
    by_class: Counter[str] = Counter()
    for mapping in mappings:
        by_class[mapping_class(mapping.path)] += mapping.resident_bytes
    if by_class:
        lines += ["", "by class of mapping"]
        lines += [f"{size / MIB:10,.1f} MiB  {name}" for name, size in by_class.most_common()]
        lines += ["", f"the largest {LARGEST_TOLD} of {len(mappings):,}"]
        largest = sorted(mappings, key=lambda mapping: mapping.resident_bytes, reverse=True)
        lines += [f"{m.resident_bytes / MIB:10,.1f} MiB  {m.path}" for m in largest[:LARGEST_TOLD]]
    return "\n".join(lines) + "\n"


def mapping_class(path: str) -> str:
    """What kind of memory a mapping is, by its name."""
    if path in ("", "[anon]") or path.startswith("[anon:"):
        return "anonymous: tensors, large Python objects, thread heaps"
    if path == "[heap]":
        return "heap: small objects"
    if path.startswith("[stack"):
        return "stacks"
    if path.startswith(("/dev/", "anon_inode:")):
        return "devices and shared memory"
    if path.endswith(".so") or ".so." in path:
        return "libraries"
    return "kernel" if path.startswith("[") else "mapped files: data sets, weights, programs"


def read_resident() -> str:
    """The text for this process at this moment."""
    import psutil

    process = psutil.Process()
    info = process.memory_full_info()
    totals = {
        name: int(getattr(info, name))
        for name in ("rss", "uss", "pss", "shared", "swap")
        if hasattr(info, name)
    }
    mappings: list[Mapping] = []
    if hasattr(process, "memory_maps"):
        mappings = [Mapping(entry.path, int(entry.rss)) for entry in process.memory_maps()]
    return resident_text(totals, mappings)
