"""Ranks in processes that are forked from a test, so that they import and load nothing anew."""

from __future__ import annotations

import os
import pickle
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any


def on_ranks(size: int, folder: Path, work: Callable[[int], Any]) -> list[Any]:
    """Return what `work(rank)` returns in a process for each rank; it must be picklable.

    Raises:
        AssertionError: one of them raised, or died.
    """
    children = [_fork(rank, folder / f"result-{rank}", work) for rank in range(size)]
    statuses = [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children]
    paths = [folder / f"result-{rank}" for rank in range(size)]
    results = [pickle.loads(path.read_bytes()) if path.exists() else None for path in paths]
    errors = [str(result) for result, status in zip(results, statuses, strict=True) if status]
    assert not any(statuses), "\n".join(errors)
    return results


def _fork(rank: int, path: Path, work: Callable[[int], Any]) -> int:
    path.unlink(missing_ok=True)
    if (child := os.fork()) != 0:
        return child
    status = 1
    try:
        path.write_bytes(pickle.dumps(work(rank)))
        status = 0
    except BaseException:  # noqa: BLE001  the test's own process raises it
        path.write_bytes(pickle.dumps(traceback.format_exc()))
    finally:
        os._exit(status)  # nothing of the test's own clean-up
