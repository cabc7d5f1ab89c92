"""The GPUs of this machine and the runs that hold them."""

from __future__ import annotations

from qwen3ft.errors import EnvironmentNotReadyError
from qwen3ft.machine.gpu_lock import holders
from qwen3ft.machine.gpus import visible_gpus
from qwen3ft.records.base import Record


class GpuHold(Record):
    """A GPU, and the run that holds it."""

    index: int
    name: str
    uuid: str
    held_by: str | None
    """Run, process and start time in words; None if no run holds it."""


def gpu_holds() -> tuple[GpuHold, ...]:
    """Return the GPUs that are visible.

    None if the driver does not answer or the lock files cannot be read: runs and `doctor` say so.
    """
    try:
        gpus = visible_gpus()
        found = holders([gpu.uuid for gpu in gpus]) if gpus else {}
    except (EnvironmentNotReadyError, OSError):
        return ()
    return tuple(
        GpuHold(
            index=gpu.index,
            name=gpu.name,
            uuid=gpu.uuid,
            held_by=found[gpu.uuid].describe() if gpu.uuid in found else None,
        )
        for gpu in gpus
    )
