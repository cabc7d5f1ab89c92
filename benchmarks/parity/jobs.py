"""One job of `parity.py` in a process of its own: `python parity_jobs.py JOB.json`.

As those of `speed.py`, with two more kinds: a path's training, and the gradients of a model.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

from benchmarks.machine import DeviceMemory
from benchmarks.speed.contestants import KINDS, main


def _training(values: dict[str, Any], memory: DeviceMemory) -> dict[str, Any]:
    from benchmarks.parity.training import train

    return train(values) | {"nvml_peak_gb": memory.stop()}


def _gradients(values: dict[str, Any], memory: DeviceMemory) -> dict[str, Any]:
    from benchmarks.parity.gradients import measure

    return measure(values) | {"nvml_peak_gb": memory.stop()}


KINDS |= {"training": _training, "gradients": _gradients}

if __name__ == "__main__":
    main(Path(sys.argv[1]))
