"""A warm process that forks the campaign's training workers, which then start without imports.

    python -m benchmarks.kills.nursery

Each line of stdin is a request: {"job": folder, "environment": {...}, "power": folder or null}. The
child runs `python -m qwen3ft.worker train JOB` in this interpreter, in a session of its own. Lines
of stdout answer: the child's process id, and its exit status as `subprocess` returns it.
"""

from __future__ import annotations

import gc
import importlib
import json
import os
import runpy
import sys
from pathlib import Path
from typing import Any

from benchmarks.kills.power import record_syncs
from qwen3ft.jobs.folders import JobDir
from qwen3ft.jobs.processes import PARENT_VARIABLE
from qwen3ft.worker.bootstrap import PRELOADED_LIBRARIES


def serve() -> None:
    """Import what workers need, then fork one for each request until stdin is closed."""
    for module in PRELOADED_LIBRARIES:
        importlib.import_module(module)
    gc.collect()
    gc.freeze()
    os.environ[PARENT_VARIABLE] = str(os.getpid())
    print("ready", flush=True)
    for line in sys.stdin:
        child = os.fork()
        if child == 0:
            _become_worker(json.loads(line))
        print(child, flush=True)
        _, status = os.waitpid(child, 0)
        print(os.waitstatus_to_exitcode(status), flush=True)


def _become_worker(request: dict[str, Any]) -> None:
    """Run the job and end this process."""
    job = JobDir(Path(request["job"]))
    os.setsid()
    os.environ.update(request["environment"])
    with Path(os.devnull).open("rb") as nothing, job.log.open("ab") as log:
        os.dup2(nothing.fileno(), 0)
        os.dup2(log.fileno(), 1)
        os.dup2(log.fileno(), 2)
    if request["power"]:
        record_syncs(Path(job.path).parents[1], Path(request["power"]))
    sys.argv = ["qwen3ft.worker", "train", str(job.path)]
    status = 1
    try:
        runpy.run_module("qwen3ft.worker", run_name="__main__")
    except SystemExit as end:
        status = int(end.code or 0)
    except BaseException:  # noqa: BLE001  printed as the interpreter would, and it ends here
        sys.excepthook(*sys.exc_info())
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)


if __name__ == "__main__":
    serve()
