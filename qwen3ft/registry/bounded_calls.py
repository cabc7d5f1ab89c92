"""Calls of MLflow that end in time, and the lock under which aliases are moved."""

from __future__ import annotations

import hashlib
import os
import tempfile
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TypeVar, TypeVarTuple

from qwen3ft.disk.locks import try_lock
from qwen3ft.errors import FinetuneError, TrackingUnavailableError
from qwen3ft.logs import mask_secrets
from qwen3ft.tracking.connection import Connection, connect, load_client
from qwen3ft.tracking.uri import database_path

ArgumentsT = TypeVarTuple("ArgumentsT")
ResultT = TypeVar("ResultT")


class BoundedCalls:
    """Makes calls of one MLflow, each within a number of seconds."""

    def __init__(self, tracking_uri: str) -> None:
        self.tracking_uri = tracking_uri
        self._connection: Connection | None = None

    def within(
        self,
        seconds: float,
        call: Callable[[Connection, *ArgumentsT], ResultT],
        *arguments: *ArgumentsT,
    ) -> ResultT:
        """Make the call in a thread, which is left behind if it takes too long.

        Raises:
            TrackingUnavailableError: it took longer than `seconds`.
            FinetuneError: whatever the call raised.
        """
        load_client()  # takes seconds the first time, and has nothing to do with the server
        outcome: list[ResultT] = []
        errors: list[FinetuneError] = []

        def work() -> None:
            try:
                if self._connection is None:
                    self._connection = connect(self.tracking_uri)
                outcome.append(call(self._connection, *arguments))
            except FinetuneError as error:
                errors.append(error)

        thread = threading.Thread(target=work, name="mlflow-registry", daemon=True)
        thread.start()
        thread.join(seconds)
        if outcome:
            return outcome[0]
        self._connection = None
        if errors:
            raise errors[0]
        raise TrackingUnavailableError(
            f"MLflow at {mask_secrets(self.tracking_uri)} gave no answer in {seconds:.0f} s.",
            why="The server or database is down, locked or overloaded.",
            next_command="qwen3ft status",
        )

    def move(
        self,
        seconds: float,
        call: Callable[[Connection, *ArgumentsT], ResultT],
        *arguments: *ArgumentsT,
    ) -> ResultT:
        """Make a call that moves aliases, under the lock, which it holds until it ends."""

        def locked(connection: Connection) -> ResultT:
            # at most half the time, so that nothing moves after the caller gave up
            with promotion_lock(self.tracking_uri, seconds / 2):
                return call(connection, *arguments)

        return self.within(seconds, locked)


@contextmanager
def promotion_lock(tracking_uri: str, wait_seconds: float) -> Iterator[None]:
    """Let one process of this machine move aliases at a time.

    Raises:
        TrackingUnavailableError: another one holds the lock for longer than `wait_seconds`.
    """
    database = database_path(tracking_uri)
    if database is not None and database.parent.is_dir():
        path = database.with_name(f"{database.name}.promote.lock")
    else:
        digest = hashlib.sha256(tracking_uri.encode()).hexdigest()[:16]
        path = Path(tempfile.gettempdir()) / f"qwen3ft-{os.getuid()}-{digest}.promote.lock"
    with try_lock(path, wait_seconds) as mine:
        if not mine:
            raise TrackingUnavailableError(
                f"Another process has been moving aliases for {wait_seconds:.0f} s.",
                why=f"It holds {path}; MLflow may be slow to answer it.",
                next_command="qwen3ft history",
            )
        yield
