"""One mover of the registry's aliases at a time on this machine, by a locked file."""

from __future__ import annotations

import hashlib
import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from qwen3ft.errors import TrackingUnavailableError
from qwen3ft.locks import held
from qwen3ft.tracking.connection import database_path


@contextmanager
def promotion_lock(tracking_uri: str, wait_seconds: float) -> Iterator[None]:
    """One mover of aliases at a time on this machine.

    Raises:
        TrackingUnavailableError: another one has it for longer than `wait_seconds`.
    """
    database = database_path(tracking_uri)
    if database is not None and database.parent.is_dir():
        path = database.with_name(f"{database.name}.promote.lock")
    else:
        digest = hashlib.sha256(tracking_uri.encode()).hexdigest()[:16]
        path = Path(tempfile.gettempdir()) / f"qwen3ft-{os.getuid()}-{digest}.promote.lock"
    with held(path, wait_seconds) as mine:
        if not mine:
            raise TrackingUnavailableError(
                f"Another process has been moving aliases for {wait_seconds:.0f} s.",
                why=f"It holds {path}; MLflow may be slow to answer it.",
                next_command="qwen3ft history",
            )
        yield
