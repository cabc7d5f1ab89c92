"""A stack that stays up: whatever ends by accident is started again, in a terminal or by systemd.

A run that was in progress when the machine went down is continued: its record is in Prefect's
database, `up` marks it as Crashed and starts the run that continues it.
"""

from __future__ import annotations

import os
import re
import signal
import threading
from pathlib import Path
from types import FrameType

from deployments.stack import Say, Stack
from qwen3ft.disk.files import write_bytes_atomic
from qwen3ft.errors import EnvironmentNotReadyError
from qwen3ft.machine.environment import EnvironmentManager

_CHECK_SECONDS = 3.0
"""Time between two checks; a run that lost its worker waits for the next one."""

_STOP_SECONDS = 120
"""Time for `down` under systemd: at most 2 x 10 s per service, and what a run writes at its end."""

_UNIT = """\
# Written by `qwen3ft up --write-unit`.
[Unit]
Description=qwen3ft in {folder}: Prefect, MLflow and a worker

[Service]
Type=exec
WorkingDirectory={folder}
ExecStart="{python}" -m qwen3ft up --stay
Restart=on-failure
RestartSec=3
KillMode=mixed
TimeoutStopSec={stop_seconds}
# when the kernel kills a training for its memory, the servers go on
OOMPolicy=continue

[Install]
WantedBy=default.target
"""


def stay_up(stack: Stack, say: Say) -> None:
    """Keep the stack up until SIGTERM or Ctrl-C, which stop it, or until `qwen3ft down`.

    Raises:
        EnvironmentNotReadyError: it cannot be started at all. Later trouble is reported, and
            starting is tried again.
    """
    ended = threading.Event()

    def end(_number: int, _frame: FrameType | None) -> None:
        ended.set()

    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, end)
    stack.up(say)
    while not ended.wait(_CHECK_SECONDS):
        try:
            if not stack.keep_up(say):
                say("Stopped by qwen3ft down.")
                return
        except EnvironmentNotReadyError as error:
            say(f"{error.what} Trying again in {_CHECK_SECONDS:.0f} s.")
    stack.down(say)


def unit_name(root: Path) -> str:
    """Return the name of a project folder's systemd unit, made from the folder's own name."""
    return f"qwen3ft-{re.sub('[^A-Za-z0-9_.-]+', '-', root.name).strip('-.') or 'project'}.service"


def write_unit(root: Path) -> Path:
    """Write a project folder's systemd user unit; neither start nor enable it.

    Returns:
        The file, where systemd looks for a user's units.
    """
    home = os.environ.get("XDG_CONFIG_HOME") or str(Path.home() / ".config")
    path = Path(home) / "systemd" / "user" / unit_name(root)
    path.parent.mkdir(parents=True, exist_ok=True)
    text = _UNIT.format(
        folder=_escaped(str(root)),
        python=_escaped(EnvironmentManager(root).get_python_executable()),
        stop_seconds=_STOP_SECONDS,
    )
    write_bytes_atomic(path, text.encode())
    return path


def _escaped(value: str) -> str:
    # in a unit file % begins a specifier and a backslash an escape
    return value.replace("\\", "\\\\").replace("%", "%%").replace('"', '\\"')
