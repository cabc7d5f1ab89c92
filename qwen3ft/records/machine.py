"""The computer as a run found it: its GPUs, who uses them, memory, versions."""

from __future__ import annotations

from typing import Literal

from qwen3ft.records.base import Record
from qwen3ft.units import gb, size_text


class GpuInfo(Record):
    """One CUDA device as NVML reports it."""

    index: int
    name: str
    uuid: str
    total_bytes: int
    free_bytes: int
    driver_version: str
    compute_capability: str | None = None


class EnvironmentReport(Record):
    """What this machine is and has free; free amounts are those of the moment."""

    python_version: str
    python_executable: str
    platform: str
    versions: dict[str, str]
    cpu_count: int
    host_total_bytes: int
    host_free_bytes: int
    disk_free_bytes: int
    gpus: tuple[GpuInfo, ...] = ()

    @property
    def device(self) -> Literal["cuda", "cpu"]:
        """Where workers train."""
        return "cuda" if self.gpus else "cpu"


class GpuProcess(Record):
    """A process that has memory of a card."""

    pid: int
    name: str | None
    used_bytes: int | None
    """None where NVML does not tell: under Windows and WSL."""

    def describe(self) -> str:
        """`python (pid 4711) holds 5.1 GB`."""
        amount = "memory" if self.used_bytes is None else size_text(self.used_bytes, 1)
        return f"{self.name or 'a process'} (pid {self.pid}) holds {amount}"


class GpuUse(Record):
    """What a card has free at a moment, and who holds the rest."""

    total_bytes: int
    free_bytes: int
    processes: tuple[GpuProcess, ...]
    """The largest first."""

    def describe(self) -> str:
        """`python (pid 4711) holds 5.1 GB, Xorg (pid 12) holds 0.1 GB of the card`."""
        if not self.processes:
            used_gb = gb(self.total_bytes - self.free_bytes)
            return f"{used_gb:.1f} GB of the card are taken, and NVML names no process"
        return ", ".join(process.describe() for process in self.processes) + " of the card"
