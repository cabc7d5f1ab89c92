"""Runs one job of a benchmark in a process of its own: a module, a folder, JSON in and JSON out.

The job and all its children are gone when `run_job` returns or raises. Its output stays in the
folder as log.txt; its result is the last line that begins with `RESULT`.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.machine import ROOT, one_gpu

RESULT = "RESULT "
OUT_OF_MEMORY = re.compile(r"OutOfMemoryError|InsufficientMemoryError|out of memory", re.IGNORECASE)


class JobFailedError(Exception):
    """A job ended without a result; `status` goes into the row of the results."""

    def __init__(self, status: str, detail: str = "") -> None:
        super().__init__(f"{status}: {detail}" if detail else status)
        self.status, self.detail = status, detail


def run_job(
    module: str,
    folder: Path,
    values: dict[str, Any],
    timeout_seconds: float,
    gpus: Sequence[str] | None = None,
) -> dict[str, Any]:
    """Run `python -m MODULE FOLDER/job.json` and return the result that it prints.

    Args:
        module: Reads the job as JSON: `values`, `folder`, and `started` (seconds since 1970).
        folder: Folder of this job alone; emptied first.
        values: Description of the job, JSON-compatible.
        timeout_seconds: Time limit; the job is killed after it.
        gpus: UUIDs of the GPUs that it sees; None for the first one.

    Raises:
        JobFailedError: The job ended without a result, or took too long.
    """
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    job, log = folder / "job.json", folder / "log.txt"
    more = {"folder": str(folder), "started": time.time()}
    job.write_text(json.dumps(values | more), encoding="utf-8")
    visible = one_gpu() if gpus is None else {"CUDA_VISIBLE_DEVICES": ",".join(gpus)}
    environment = {**os.environ, **visible, "PYTHONPATH": python_path()}
    with log.open("wb") as stream:
        process = subprocess.Popen(
            [sys.executable, "-m", module, str(job)],
            stdout=stream,
            stderr=subprocess.STDOUT,
            cwd=folder,
            env=environment,
            start_new_session=True,
        )
        try:
            status = process.wait(timeout_seconds)
        except subprocess.TimeoutExpired:
            raise JobFailedError("failed", f"timeout after {timeout_seconds:g} s") from None
        finally:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()
    lines = log.read_text(encoding="utf-8", errors="replace").splitlines()
    found = [line for line in lines if line.startswith(RESULT)]
    if found:
        result: dict[str, Any] = json.loads(found[-1].removeprefix(RESULT))
        return result
    raise failure_of(status, lines)


def failure_of(status: int, lines: list[str]) -> JobFailedError:
    """Explain why a job ended without a result, by its exit status and the end of its log."""
    end = [line.strip() for line in lines[-60:] if line.strip()]
    causes = [line for line in end if re.match(r"[\w.]*(Error|Exception|Interrupt)\b", line)]
    last = (causes or end or ["no output"])[-1][:200]
    if any(OUT_OF_MEMORY.search(line) for line in end):
        return JobFailedError("out of memory", last)
    if status < 0:
        return JobFailedError("failed", f"ended by signal {-status}; {last}")
    return JobFailedError("failed", last)


def python_path() -> str:
    """Return this process's PYTHONPATH with absolute folders, the checkout first."""
    inherited = [
        str(Path(entry).resolve())
        for entry in os.environ.get("PYTHONPATH", "").split(os.pathsep)
        if entry
    ]
    return os.pathsep.join([str(ROOT), *inherited])
