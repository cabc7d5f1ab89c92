"""A host that joins an attempt: it waits for a run in progress only."""

from __future__ import annotations

from pathlib import Path

import pytest
from support.plans import plan_for

from flows import join
from qwen3ft.errors import EnvironmentNotReadyError
from qwen3ft.jobs.folders import RunDir
from qwen3ft.locks import try_lock


def test_a_host_gives_up_at_once_on_a_run_that_is_gone(tmp_path: Path) -> None:
    """A run that was killed leaves no failure, and takes back no request; its lock is free."""
    run = RunDir(tmp_path)
    first = run.attempt(1).create(plan_for())
    with try_lock(run.lock):
        join._require_in_progress(first, run)
    with pytest.raises(EnvironmentNotReadyError, match="attempts/01 is over"):
        join._wait_for_start(first, run)
    with try_lock(run.lock):  # resumed
        second = run.attempt(2).create(plan_for())
        with pytest.raises(EnvironmentNotReadyError, match="attempts/01 is over"):
            join._wait_for_start(first, run)
        second.heartbeat.touch()
        join._wait_for_start(second, run)
