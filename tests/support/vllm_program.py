"""A program `vllm` that loads for ever, as vLLM may while signals do not reach it."""

from __future__ import annotations

import sys
from pathlib import Path

PIDS_VARIABLE = "VLLM_PIDS_FILE"
"""File to which the program and its own process add their ids."""

_SCRIPT = f"""#!{sys.executable}
import os, signal, time
signal.signal(signal.SIGTERM, signal.SIG_IGN)
if os.fork() == 0:
    os.setsid()
if path := os.environ.get("{PIDS_VARIABLE}"):
    with open(path, "a") as file:
        file.write(f"{{os.getpid()}}\\n")
while True:
    time.sleep(60)
"""


def place_vllm(folder: Path, version: str) -> Path:
    """Put the program and the name of its version into an environment; return its path."""
    about = folder / "lib/python3.11/site-packages" / f"vllm-{version}.dist-info"
    about.mkdir(parents=True)
    text = f"Metadata-Version: 2.1\nName: vllm\nVersion: {version}\n"
    (about / "METADATA").write_text(text, encoding="utf-8")
    program = folder / "bin/vllm"
    program.parent.mkdir()
    program.write_text(_SCRIPT, encoding="utf-8")
    program.chmod(0o755)
    return program
