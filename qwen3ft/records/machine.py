"""The computer as a run found it: GPUs and who uses them, memory, versions."""

from __future__ import annotations

from typing import Literal

from qwen3ft.records.base import Record
from qwen3ft.units import gb, size_text


class GpuInfo(Record):
    """CUDA device as NVML reports it."""

    index: int
    name: str
    uuid: str
    total_bytes: int
    free_bytes: int
    driver_version: str
    compute_capability: str | None = None


class EnvironmentReport(Record):
    """Versions, sizes and free memory of this machine; free amounts are those of the moment."""

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
        """Device that workers train on."""
        return "cuda" if self.gpus else "cpu"


class GpuProcess(Record):
    """Process that holds memory of a GPU."""

    pid: int
    name: str | None
    used_bytes: int | None
    """None where NVML does not report it: under Windows and WSL."""

    def describe(self) -> str:
        """Return `python (pid 4711) holds 5.1 GB`."""
        amount = "memory" if self.used_bytes is None else size_text(self.used_bytes, 1)
        return f"{self.name or 'a process'} (pid {self.pid}) holds {amount}"


class GpuUse(Record):
    """Free memory of a GPU at a moment, and the processes that hold the rest."""

    total_bytes: int
    free_bytes: int
    processes: tuple[GpuProcess, ...]
    """Largest first."""

    def describe(self) -> str:
        """Return `python (pid 4711) holds 5.1 GB, Xorg (pid 12) holds 0.1 GB of the GPU`."""
        if not self.processes:
            used_gb = gb(self.total_bytes - self.free_bytes)
            return f"{used_gb:.1f} GB of the GPU are taken, and NVML names no process"
        return ", ".join(process.describe() for process in self.processes) + " of the GPU"
