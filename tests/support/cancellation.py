"""A project without servers, in which `qwen3ft train` runs as a process of its own."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from support.databases import place_databases

from qwen3ft import faults
from qwen3ft.jobs.folders import RunDir

ROOT = Path(__file__).parents[2]
CONFIG = "deployments/configs/embedded.yaml"
LIMIT_SECONDS = 600.0

# A shell starts what runs in its background with Ctrl-C ignored, and children inherit that.
PROGRAM = """
import signal, sys
signal.signal(signal.SIGINT, signal.default_int_handler)
from flows.cli.app import main
sys.exit(main())
"""


class TrainProject:
    """A folder to run commands in.

    Args:
        root: An empty folder.
    """

    def __init__(self, root: Path) -> None:
        self.root = root
        shutil.copytree(ROOT / "deployments" / "configs", root / "deployments" / "configs")
        shutil.copy(ROOT / "deployments" / "prefect.yaml", root / "deployments")
        place_databases(root)

    def start(self, *arguments: str, fault: str = "") -> subprocess.Popen[str]:
        """Start `qwen3ft ARGUMENTS` with a planted fault."""
        return subprocess.Popen(
            [sys.executable, "-c", PROGRAM, *arguments],
            cwd=self.root,
            env={
                **{name: text for name, text in os.environ.items() if "PREFECT" not in name},
                "PYTHONPATH": str(ROOT),
                "CUDA_VISIBLE_DEVICES": "",
                faults.VARIABLE: fault,
            },
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )

    def runs(self) -> list[RunDir]:
        """Return the runs that have begun."""
        return [RunDir(path.parent) for path in self.root.glob("runs/*/config.json")]


def wait_for(condition: Callable[[], Any], process: subprocess.Popen[str]) -> None:
    """Wait until `condition` holds, while the process is alive."""
    end = time.monotonic() + LIMIT_SECONDS
    while not condition():
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < end, f"not within {LIMIT_SECONDS:.0f} s"
        time.sleep(0.2)
