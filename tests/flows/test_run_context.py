"""A run survives the loss of the reader of its output."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

PROGRAM = """
import sys, time
from pathlib import Path
from rich.console import Console
from flows.run_context import survive_closed_pipes
survive_closed_pipes()
print("ready", flush=True)
sys.stdin.readline()
time.sleep(0.3)
for console in (Console(), Console(stderr=True)):
    console.print("to nobody")
Path(sys.argv[1]).write_text("alive")
"""


def test_a_process_outlives_the_reader_of_its_output(tmp_path: Path) -> None:
    """Rich would end it; both streams are watched."""
    said = tmp_path / "said"
    command = [sys.executable, "-c", PROGRAM, str(said)]
    pipe = subprocess.PIPE
    process = subprocess.Popen(command, stdin=pipe, stdout=pipe, stderr=pipe)
    assert process.stdin is not None
    assert process.stdout is not None
    assert process.stderr is not None
    assert process.stdout.readline() == b"ready\n"
    process.stdout.close()
    process.stderr.close()
    process.stdin.close()
    assert process.wait(30) == 0
    assert said.read_text() == "alive"
