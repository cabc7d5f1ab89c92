"""A worker's silence is timed by a clock that nobody sets."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from qwen3ft.errors import StalledError
from qwen3ft.jobs.folders import JobDir
from qwen3ft.jobs.launcher import _watch
from qwen3ft.jobs.processes import end_process_tree

HOUR_SECONDS = 3600.0
PROGRAM = """
import os, sys, time
from pathlib import Path
from qwen3ft.jobs.heartbeat import Heartbeat
path, jump, beats = Path(sys.argv[1]), float(sys.argv[2]), int(sys.argv[3])
heartbeat = Heartbeat(path)
for number in range(beats):
    heartbeat.beat("train", number)
    now = time.time() + (jump if number > 1 else 0.0)  # as if the clock were set after two beats
    os.utime(path, (now, now))
    time.sleep(0.3)
time.sleep(float(sys.argv[4]))
"""


@pytest.mark.parametrize("jump_seconds", [HOUR_SECONDS, -HOUR_SECONDS])
@pytest.mark.parametrize("goes_silent", [True, False])
def test_a_clock_that_is_set_neither_fakes_nor_hides_a_stall(
    tmp_path: Path, jump_seconds: float, goes_silent: bool
) -> None:
    """Beats an hour away are beats; a heartbeat an hour in the future can still fall silent."""
    job = JobDir(tmp_path)
    arguments = (str(job.heartbeat), str(jump_seconds), "6", "600" if goes_silent else "0")
    command = [sys.executable, "-c", PROGRAM, *arguments]
    process = subprocess.Popen(command, env=os.environ, start_new_session=True)
    try:
        stall = _watch(process, job, 1.5 if goes_silent else 60.0)
    finally:
        end_process_tree(process)
    assert isinstance(stall, StalledError) is goes_silent
