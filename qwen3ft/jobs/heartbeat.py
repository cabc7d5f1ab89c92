"""Signals between a worker and the process that watches it: signs of life, a request to stop."""

from __future__ import annotations

import json
import os
import time
from pathlib import Path

from qwen3ft.errors import PreemptedError


class Heartbeat:
    """Tells the launcher that this process makes progress, and in which phase."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.phase = "start"

    def beat(self, phase: str, step: int = 0) -> None:
        """Write {phase, step}; a new modification time is the sign of life."""
        self.phase = phase
        temporary = self.path.with_suffix(".new")
        temporary.write_text(json.dumps({"phase": phase, "step": step}), encoding="utf-8")
        os.replace(temporary, self.path)


class StopRequest:
    """Set by SIGTERM or SIGINT; training saves and stops at the end of the current step."""

    def __init__(self) -> None:
        self.signal_name: str | None = None

    def wait(self, seconds: float) -> None:
        """Wait until it is set, at most `seconds`."""
        end = time.monotonic() + seconds
        while self.signal_name is None and time.monotonic() < end:
            time.sleep(0.05)

    def error(self) -> PreemptedError:
        """Return the error for this request."""
        return PreemptedError(
            f"The worker was asked to stop ({self.signal_name}).",
            why="The run was cancelled or the machine is shutting down.",
            next_command="prefect deployment run qwen3-finetune/default",
            signal=self.signal_name,
        )
