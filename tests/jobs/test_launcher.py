"""A worker's silence is timed by a clock that nobody sets."""

from __future__ import annotations

import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from itertools import product
from pathlib import Path

import psutil
import pytest

from qwen3ft.errors import StalledError
from qwen3ft.jobs.folders import JobDir
from qwen3ft.jobs.heartbeat import Heartbeat
from qwen3ft.jobs.launcher import _stalled, _watch, try_worker
from qwen3ft.jobs.processes import end_process_tree, start_worker
from qwen3ft.records.training import AttemptOutcome, Failure

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


def _stalls(folder: Path, jump_seconds: float, *, goes_silent: bool) -> bool:
    """Watch a process whose clock is set while it beats; return True if it was said to stall."""
    folder.mkdir()
    job = JobDir(folder)
    arguments = (str(job.heartbeat), str(jump_seconds), "6", "600" if goes_silent else "0")
    command = [sys.executable, "-c", PROGRAM, *arguments]
    process = subprocess.Popen(command, env=os.environ, start_new_session=True)
    try:
        stall = _watch(process, job, 1.5 if goes_silent else 60.0)
    finally:
        end_process_tree(process)
    assert stall is None or isinstance(stall, StalledError)
    return stall is not None


def test_a_clock_that_is_set_neither_fakes_nor_hides_a_stall(tmp_path: Path) -> None:
    """Beats an hour away are beats; a heartbeat an hour in the future can still fall silent.

    The four processes mostly sleep, and do so at the same time.
    """
    cases = list(product((HOUR_SECONDS, -HOUR_SECONDS), (True, False)))
    with ThreadPoolExecutor(len(cases)) as pool:
        watched = [
            pool.submit(_stalls, tmp_path / str(number), jump_seconds, goes_silent=silent)
            for number, (jump_seconds, silent) in enumerate(cases)
        ]
    for (jump_seconds, silent), stalled in zip(cases, watched, strict=True):
        assert stalled.result() is silent, (jump_seconds, silent)


def test_a_rank_that_is_silent_is_named_though_folders_of_others_are_missing(
    tmp_path: Path,
) -> None:
    """Those of another host's ranks are made there, later."""
    job = JobDir(tmp_path)
    for rank in (1, 2):
        job.rank(rank).path.mkdir(parents=True)
    job.rank(1).heartbeat.write_text('{"phase": "train", "step": 4}')
    error = _stalled(job, 60.0, 60.0)
    assert error.what.startswith("Rank 2 gave no sign of life for 60 s")
    assert error.facts["rank"] == 2


def test_one_process_after_several_ranks_does_not_find_their_folders(tmp_path: Path) -> None:
    """A stall would be laid on a rank that is no longer there."""
    job = JobDir(tmp_path)
    job.request.write_text("{}")
    for rank in range(2):
        job.rank(rank).path.mkdir(parents=True)
    assert isinstance(try_worker("data", job, AttemptOutcome, stall_seconds=60), Failure)
    assert job.ranks() == []


@pytest.mark.skipif(sys.platform != "linux", reason="forks by Linux's means")
def test_tests_share_the_imports_of_their_workers(tmp_path: Path) -> None:
    """A worker is forked by a process that has imported for it, and is a child of this one."""
    job = JobDir(tmp_path)
    job.request.write_text("{}")
    worker = start_worker("data", job)
    found = psutil.Process(worker.pid)
    words = found.cmdline()
    assert words == psutil.Process().cmdline() or "warm_workers" in " ".join(words)
    assert found.ppid() == os.getpid()
    assert worker.wait(120) == 1
    assert "DataRequest" in job.log.read_text()


def test_a_rank_that_is_done_is_not_the_one_that_hangs(tmp_path: Path) -> None:
    """Where transformers answers, all ranks but the first have ended long before."""
    job = JobDir(tmp_path)
    for rank, phase in enumerate(("answers", "load")):
        folder = job.rank(rank)
        folder.path.mkdir(parents=True)
        Heartbeat(folder.heartbeat).beat(phase, 0)
        os.utime(folder.heartbeat, (1000 - rank, 1000 - rank))
    assert _stalled(job, 60, 50).what.startswith("Rank 1 gave no sign")
    job.rank(1).outcome.touch()
    assert _stalled(job, 60, 50).what.startswith("Rank 0 gave no sign")
