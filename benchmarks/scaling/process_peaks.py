"""Peaks of the processes on the GPUs, from NVML's list of them."""

from __future__ import annotations

import threading
from typing import Any

from qwen3ft.machine.gpus import visible_gpus
from qwen3ft.units import GIB


class ProcessPeaks:
    """Samples what NVML says of each process that comes to a visible GPU after the start.

    Args:
        interval_seconds: Time between two samples.
    """

    def __init__(self, interval_seconds: float = 0.05) -> None:
        self._interval_seconds = interval_seconds
        self._peaks: dict[int, int] = {}
        self._end = threading.Event()
        self._handles = _handles()
        self._before = {process.pid for process in self._processes()}
        self._thread = threading.Thread(target=self._sample, daemon=True)
        self._thread.start()

    def _processes(self) -> list[Any]:
        import pynvml

        return [
            process
            for handle in self._handles
            for process in pynvml.nvmlDeviceGetComputeRunningProcesses(handle)
        ]

    def _sample(self) -> None:
        while self._handles and not self._end.wait(self._interval_seconds):
            for process in self._processes():
                if process.pid not in self._before:
                    used = process.usedGpuMemory or 0  # None where NVML may not say
                    self._peaks[process.pid] = max(self._peaks.get(process.pid, 0), used)

    def stop(self) -> list[float]:
        """Stop sampling; return the peaks in GB, highest first; of containers often none."""
        self._end.set()
        self._thread.join()
        return sorted((peak / GIB for peak in self._peaks.values()), reverse=True)


def _handles() -> list[Any]:
    gpus = visible_gpus()
    if not gpus:
        return []
    import pynvml

    pynvml.nvmlInit()
    return [pynvml.nvmlDeviceGetHandleByUUID(gpu.uuid) for gpu in gpus]
