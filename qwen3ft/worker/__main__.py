"""The worker process: `python -m qwen3ft.worker KIND DIR`, or `wait` for a job on stdin.

A rank of a training gets the folder of the attempt, and takes its own below that.

It reads its request from DIR and leaves an outcome or a classified failure there. Only
`qwen3ft.jobs.processes` starts it, so that a CUDA error, a leak or a native exit ends nothing else.
It dies with the process that started it.
"""

from __future__ import annotations

import gc
import os
import signal
import sys
import time
from pathlib import Path
from typing import Any

from qwen3ft import logs
from qwen3ft.errors import MemoryLeakError, OutOfMemoryError, PreemptedError
from qwen3ft.jobs.failures import translate
from qwen3ft.jobs.folders import write_record
from qwen3ft.jobs.processes import PREEMPTED_STATUS, WAIT
from qwen3ft.machine.memory_report import write_memory_report
from qwen3ft.records.training import Failure
from qwen3ft.worker.agent import ANSWERING_RANK, RANK
from qwen3ft.worker.bootstrap import (
    die_with_parent,
    enter_rank,
    import_libraries,
    set_process_name,
    wait_for_job,
)
from qwen3ft.worker.jobs import KINDS, Job

logger = logs.get_logger("worker")

WITHOUT_TEARDOWN = ("ranks", "join", RANK, "answering-ranks", ANSWERING_RANK)
"""Kinds that end at once: what libraries clean up at exit may wait for ranks that are gone."""


def _run_job(kind: str, path: Path) -> int:
    """Run one job; return the exit status, which is 0 only if an outcome was written."""
    set_process_name(kind)
    logs.configure(console=True, json_path=path / "log.jsonl")
    job = Job(path)
    signal.signal(signal.SIGTERM, job.on_signal)
    signal.signal(signal.SIGINT, job.on_signal)
    started = time.monotonic()
    try:
        import_libraries(kind)
        outcome = KINDS[kind](job)
    except Exception as error:  # whatever a library raises becomes a failure on disk
        # A library may catch what the signal's handler raised within it, and raise another error.
        failure = job.stop.error() if job.is_broken_off else translate(error, job.heartbeat.phase)
        logger.error("%s failed after %.1f s: %s", kind, time.monotonic() - started, failure)
        if failure is not error:
            logger.info("traceback of the cause", exc_info=error)
        write_record(job.dir.failure, Failure.from_error(failure))
        if isinstance(failure, (OutOfMemoryError, MemoryLeakError)):
            # Before `_free`: until then the error's frames still hold what filled memory.
            write_memory_report(job.dir.memory_report, failure.what)
        if kind not in WITHOUT_TEARDOWN:  # freeing waits for a kernel that waits for a lost rank
            _free(error)
        return PREEMPTED_STATUS if isinstance(failure, PreemptedError) else 1
    write_record(job.dir.outcome, outcome)
    logger.info("%s done in %.1f s", kind, time.monotonic() - started)
    return 0


def _free(error: BaseException) -> None:
    """Free the memory that a failed job's frames still hold."""
    error.__traceback__ = None
    gc.collect()
    torch: Any = sys.modules.get("torch")
    if torch is not None and torch.cuda.is_available() and torch.cuda.is_initialized():
        torch.cuda.empty_cache()


def _run(kind: str, *arguments: str) -> int:
    """Run the process from start to end; return its exit status."""
    die_with_parent()
    if kind == WAIT:
        set_process_name(WAIT)
        job = wait_for_job()
    elif kind in (RANK, ANSWERING_RANK):
        job = kind, enter_rank(Path(*arguments))
    else:
        job = kind, Path(*arguments)
    status = _run_job(*job) if job is not None else 0
    if job is not None and job[0] in WITHOUT_TEARDOWN:
        for stream in (sys.stdout, sys.stderr):
            stream.flush()
        os._exit(status)
    gc.freeze()  # otherwise Python collects garbage among all imported objects at exit: 2 s
    return status


if __name__ == "__main__":
    sys.exit(_run(*sys.argv[1:]))
