"""Keeps MLflow up to date with a run while it runs, and catches up on earlier runs.

The caller never waits for MLflow beyond the timeout it gives, and never sees its errors. An outage
is reported once, retried after 1 s, 2 s, ... up to 30 s, and loses nothing (see
`qwen3ft.tracking.sender`), except for system metrics: those are sampled live and not journaled. One
process at a time sends a run. A thread stuck in a request does not keep the process from exiting.
"""

from __future__ import annotations

import threading
import time
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

from qwen3ft.disk.files import end_last_line
from qwen3ft.disk.locks import try_lock
from qwen3ft.errors import TrackingUnavailableError
from qwen3ft.jobs.folders import RunDir
from qwen3ft.logs import get_logger, mask_secrets
from qwen3ft.tracking.connection import start_system_metrics
from qwen3ft.tracking.cursor import operations, outstanding
from qwen3ft.tracking.journal import (
    AttemptEnded,
    AttemptStarted,
    Journal,
    RunFinished,
    RunStarted,
    journal_path,
)
from qwen3ft.tracking.sender import Sender

_POLL_SECONDS = 1.0  # between two looks at the journal and the attempts' files

_FIRST_WAIT_SECONDS = 1.0
_LONGEST_WAIT_SECONDS = 30.0
_LAST_WAIT_SECONDS = 0.3
_HOPE_SECONDS = 60.0  # after an outage this long, `close` waits for one last try only
_LAST_TRY_SECONDS = 2.0

_log = get_logger("tracking")


class Mirror:
    """Sends a run to MLflow from a thread, from `start` until `close`.

    Args:
        run_dir: The run; its `Journal` may be written to before, during and after.
        tracking_uri: Address of MLflow, which need not be reachable.
    """

    def __init__(self, run_dir: RunDir, tracking_uri: str) -> None:
        self.run_dir = run_dir
        self.tracking_uri = tracking_uri
        self._system_metrics: Any | None = None
        self._wake = threading.Event()
        self._closing = threading.Event()
        self._abandoned = threading.Event()
        self._out_since: float | None = None
        self._thread = threading.Thread(target=self._run, name="mlflow-mirror", daemon=True)

    def start(self) -> Mirror:
        """Begin to send; return at once.

        Start it before the run is journaled: a run that nobody sends counts as abandoned.
        """
        self._thread.start()
        return self

    def close(self, timeout_seconds: float = 30.0) -> bool:
        """Send the rest and stop, within `timeout_seconds`; sooner if MLflow has long been gone.

        Returns:
            True if MLflow has everything; what it lacks stays in the journal for `replay_unsent`.
        """
        self._closing.set()
        self._wake.set()
        end = time.monotonic() + timeout_seconds
        if self._out_since is not None and self._thread.is_alive():
            hope_seconds = _HOPE_SECONDS - (time.monotonic() - self._out_since)
            self._thread.join(min(timeout_seconds, max(_LAST_TRY_SECONDS, hope_seconds)))
        if self._out_since is None and self._thread.is_alive():
            self._thread.join(max(0.0, end - time.monotonic()))
        self._abandoned.set()
        self._wake.set()
        if self._thread.is_alive():
            self._thread.join(_LAST_WAIT_SECONDS)  # releases the lock, unless stuck in a request
        return not self._thread.is_alive() and outstanding(self.run_dir) == 0

    def _run(self) -> None:
        is_done = False
        while not is_done and not self._abandoned.is_set():
            with _sole_sender(self.run_dir) as is_sole:
                if is_sole:
                    self._send_until_closed()
            is_done = is_sole or self._closing.wait(_POLL_SECONDS)

    def _send_until_closed(self) -> None:
        sender = Sender(self.run_dir, self.tracking_uri)
        wait_seconds = _FIRST_WAIT_SECONDS
        while not self._abandoned.is_set():
            try:
                worked = sender.step()
            except TrackingUnavailableError as error:
                if self._out_since is None:
                    self._report_outage(error)
                    self._out_since = time.monotonic()
                woken = self._wake.wait(wait_seconds)
                self._wake.clear()
                longer_seconds = min(2 * wait_seconds, _LONGEST_WAIT_SECONDS)
                wait_seconds = _FIRST_WAIT_SECONDS if woken else longer_seconds
                continue
            was_out, self._out_since = self._out_since is not None, None
            if was_out:
                _log.info("MLflow at %s is back.", mask_secrets(self.tracking_uri))
            self._sample_system(sender, restart=was_out)
            wait_seconds = _FIRST_WAIT_SECONDS
            if not worked:
                if self._closing.is_set():
                    break
                self._wake.wait(_POLL_SECONDS)
                self._wake.clear()
        self._stop_sampling()

    def _report_outage(self, error: TrackingUnavailableError) -> None:
        _log.warning(
            "MLflow at %s is unreachable; everything is kept in %s and will be sent later. (%s)",
            mask_secrets(self.tracking_uri),
            self.run_dir.path,
            error.what,
        )

    def _sample_system(self, sender: Sender, *, restart: bool) -> None:
        """Keep MLflow's monitor running; it ends by itself in an outage."""
        run_id, connection = sender.state.parent_run_id, sender.connection
        if run_id is None or connection is None or self._closing.is_set():
            return
        if restart:
            self._stop_sampling()
        if self._system_metrics is None:
            self._system_metrics = start_system_metrics(connection, run_id)

    def _stop_sampling(self) -> None:
        if self._system_metrics is not None:
            self._system_metrics.finish()
            self._system_metrics = None


def replay_unsent(runs_dir: Path, tracking_uri: str, *, current: RunDir | None = None) -> int:
    """Send what MLflow lacks of every run below `runs_dir` that nothing is sending now.

    A run whose process died is first closed as KILLED. Stops at the first sign of an outage.

    Args:
        runs_dir: Folder with one subfolder per run.
        tracking_uri: Address of MLflow.
        current: Run that this process is just starting; it is left alone.

    Returns:
        Number of runs that MLflow does not have completely.
    """
    runs = [RunDir(path.parent) for path in sorted(runs_dir.glob("*/tracking.jsonl"))]
    runs = [run_dir for run_dir in runs if run_dir != current]
    reachable = True
    for run_dir in runs:
        with _sole_sender(run_dir) as is_sole:
            if not is_sole:
                continue
            _close_abandoned(run_dir)
            if reachable and outstanding(run_dir):
                reachable = _send_all(run_dir, tracking_uri)
    return sum(1 for run_dir in runs if outstanding(run_dir))


def _send_all(run_dir: RunDir, tracking_uri: str) -> bool:
    """Send what MLflow lacks of one run; False at the first sign of an outage."""
    try:
        Sender(run_dir, tracking_uri).send_all()
    except TrackingUnavailableError as error:
        _log.warning("%s is kept and will be sent later. %s", run_dir.path, error.what)
        return False
    return True


def _close_abandoned(run_dir: RunDir) -> None:
    """Journal the end of a run and its attempts that a dead process left open."""
    is_open, attempts = False, set[int]()
    end_last_line(journal_path(run_dir))  # its writer is gone
    for operation in operations(run_dir):
        match operation:
            case RunStarted():
                is_open = True
            case RunFinished():
                is_open = False
            case AttemptStarted():
                attempts.add(operation.number)
            case AttemptEnded():
                attempts.discard(operation.number)
            case _:
                pass
    if is_open:
        journal = Journal(run_dir)
        for number in sorted(attempts):
            journal.attempt_ended(number, "KILLED")
        journal.run_finished("KILLED")


def _sole_sender(run_dir: RunDir) -> AbstractContextManager[bool]:
    """Lock the run for this process to send; False if another process is sending it."""
    run_dir.path.mkdir(parents=True, exist_ok=True)
    return try_lock(run_dir.path / "tracking.lock")
