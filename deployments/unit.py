"""A systemd user unit, written on request: the stack then starts with the machine.

What was running when the machine went down is taken up again: its record is in Prefect's database,
`up` marks it as Crashed, and the server starts it once more (see `deployments.automations`).
"""

from __future__ import annotations

import os
import re
from pathlib import Path

from qwen3ft.files import write_bytes_atomic
from qwen3ft.machine.environment import EnvironmentManager

STOP_SECONDS = 120
"""Three services at 2 x 10 s each at most, and what a run writes before it ends."""

TEMPLATE = """\
# Written by `qwen3ft up --write-unit`.
[Unit]
Description=qwen3ft in {folder}: Prefect, MLflow and a worker

[Service]
Type=exec
WorkingDirectory={folder}
ExecStart="{python}" -m flows.cli up --stay
Restart=on-failure
RestartSec=3
KillMode=mixed
TimeoutStopSec={stop_seconds}
# a training that the kernel ends for its memory does not take the servers with it
OOMPolicy=continue

[Install]
WantedBy=default.target
"""


def unit_name(root: Path) -> str:
    """The unit of a project folder; the folder's name is enough on a machine with one project."""
    return f"qwen3ft-{re.sub('[^A-Za-z0-9_.-]+', '-', root.name).strip('-.') or 'project'}.service"


def write_unit(root: Path) -> Path:
    """Write the unit of a project folder to where systemd looks for a user's units.

    Returns:
        The file. Nothing is started, and nothing enabled.
    """
    home = os.environ.get("XDG_CONFIG_HOME") or str(Path.home() / ".config")
    path = Path(home) / "systemd" / "user" / unit_name(root)
    path.parent.mkdir(parents=True, exist_ok=True)
    text = TEMPLATE.format(
        folder=_escaped(str(root)),
        python=_escaped(EnvironmentManager(root).get_python_executable()),
        stop_seconds=STOP_SECONDS,
    )
    write_bytes_atomic(path, text.encode())
    return path


def _escaped(value: str) -> str:
    """For a unit file, where % begins a specifier and a backslash an escape."""
    return value.replace("\\", "\\\\").replace("%", "%%").replace('"', '\\"')
