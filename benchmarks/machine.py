"""The machine that results belong to, read without torch, and how results are written."""

from __future__ import annotations

import json
import os
import platform
import threading
from collections.abc import Callable, Mapping
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from qwen3ft.machine.gpus import visible_gpus
from qwen3ft.units import GIB

ROOT = Path(__file__).resolve().parents[1]
PACKAGES = (
    *("qwen3ft", "torch", "triton", "transformers", "accelerate", "peft", "bitsandbytes"),
    *("trl", "unsloth", "unsloth_zoo", "liger-kernel", "prefect", "mlflow"),
)


def machine() -> dict[str, Any]:
    """Return the date, GPU, driver, CPU and package versions that stand in every result."""
    gpus = visible_gpus()
    return {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "gpu": gpus[0].name if gpus else None,
        "gpu_total_gb": round(gpus[0].total_bytes / GIB, 2) if gpus else None,
        "driver": gpus[0].driver_version if gpus else None,
        "cpu": platform.machine(),
        "cpu_count": os.cpu_count(),
        "python": platform.python_version(),
        "versions": {name: _version(name) for name in PACKAGES},
    }


def write_json(path: Path, results: dict[str, Any]) -> None:
    """Write `results` to `path` as indented JSON, atomically; create missing folders."""
    path.parent.mkdir(parents=True, exist_ok=True)
    new = path.with_name(path.name + ".new")
    new.write_text(json.dumps(results, indent=2) + "\n", encoding="utf-8")
    os.replace(new, path)


def report(result: Mapping[str, Any], bars: Mapping[str, bool], out: Path | None) -> int:
    """Print results and which bars they held, and write them; return 1 if one was missed."""
    about = machine()
    print(f"{about['date']}, load average {os.getloadavg()[0]:.1f}")
    for name, value in result.items():
        print(f"{name:26} {value:,}" if isinstance(value, int) else f"{name:26} {value}")
    for bar, holds in bars.items():
        print(f"{'held  ' if holds else 'MISSED'} {bar}")
    if out:
        write_json(out, {"machine": about, **result})
    return 0 if all(bars.values()) else 1


def one_gpu() -> dict[str, str]:
    """Return the environment that restricts a child process to the first visible GPU."""
    gpus = visible_gpus()
    return {"CUDA_VISIBLE_DEVICES": gpus[0].uuid} if len(gpus) > 1 else {}


def _version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None


class DeviceMemory:
    """Samples how much the GPU's memory in use has grown since the start, every few milliseconds.

    Reads the device's total, since NVML's list of processes is often empty in containers. Other
    programs on the GPU are counted too, so use one that is otherwise idle.

    Args:
        index: Number of the GPU among the visible ones.
        interval_seconds: Time between two samples.
    """

    def __init__(self, index: int = 0, interval_seconds: float = 0.01) -> None:
        self.peak_bytes: int | None = None
        self._interval_seconds = interval_seconds
        self._end = threading.Event()
        self._read = _reader(index)
        if self._read is not None:
            self._before = self._read()
            self.peak_bytes = 0
            self._thread = threading.Thread(target=self._sample, daemon=True)
            self._thread.start()

    def _sample(self) -> None:
        assert self._read is not None
        while not self._end.wait(self._interval_seconds):
            self.peak_bytes = max(self.peak_bytes or 0, self._read() - self._before)

    def stop(self) -> float | None:
        """Stop sampling and return the peak in GB; None without a GPU."""
        self._end.set()
        return None if self.peak_bytes is None else self.peak_bytes / GIB


def _reader(index: int) -> Callable[[], int] | None:
    """Return a function that reads the bytes in use on a visible GPU, without CUDA."""
    gpus = visible_gpus()
    if not gpus:
        return None
    import pynvml

    pynvml.nvmlInit()
    handle = pynvml.nvmlDeviceGetHandleByUUID(gpus[index].uuid)
    return lambda: int(pynvml.nvmlDeviceGetMemoryInfo(handle).used)
