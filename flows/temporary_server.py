"""A Prefect server for a flow that runs without one: `qwen3ft train`, or a call in a script.

Prefect has one too, which gives up with a traceback when the machine is busy, and answers everybody
on this machine. This one is the stack's, with a secret of its own, without pages.
"""

from __future__ import annotations

import os
import secrets
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO

from prefect.events.worker import EventsWorker
from prefect.logging.handlers import APILogWorker
from prefect.settings import (
    PREFECT_API_AUTH_STRING,
    PREFECT_API_URL,
    PREFECT_HOME,
    PREFECT_UI_URL,
    temporary_settings,
)

from deployments import services
from deployments.processes import free_port
from deployments.secret import auth_string
from qwen3ft.disk.files import PRIVATE_UMASK
from qwen3ft.errors import EnvironmentNotReadyError

START_SECONDS = 180.0
"""Longest wait for its first answer: a busy machine needs more than a minute."""

_FIRST_PORTS = range(8000, 9000)


@contextmanager
def temporary_server() -> Iterator[None]:
    """Run a Prefect server for this process while the body runs, unless one is configured.

    Raises:
        EnvironmentNotReadyError: it ended, or did not answer in time.
    """
    if PREFECT_API_URL.value():
        yield
        return
    secret = secrets.token_urlsafe(32)
    port = free_port(secrets.choice(_FIRST_PORTS))  # not the one that another process chooses now
    api = f"http://127.0.0.1:{port}/api"
    settings = {
        PREFECT_API_URL: api,
        PREFECT_API_AUTH_STRING: auth_string(secret),
        PREFECT_UI_URL: "",  # it has no pages that a record could name
    }
    with tempfile.TemporaryFile() as log:
        process = _start(port, secret, log)
        try:
            _wait(process, api, secret, log)
            with temporary_settings(settings):
                try:
                    yield
                finally:  # send what is left, while it can be received
                    EventsWorker.drain_all()
                    APILogWorker.drain_all()
        finally:
            process.terminate()
            process.wait()


def _start(port: int, secret: str, log: IO[bytes]) -> subprocess.Popen[bytes]:
    home = Path(PREFECT_HOME.value())
    home.mkdir(parents=True, exist_ok=True)
    environment = {
        **os.environ,
        "PREFECT_HOME": str(home),
        "PREFECT_SERVER_API_AUTH_STRING": auth_string(secret),
        "PREFECT_SERVER_UI_ENABLED": "false",
        "PREFECT_SERVER_ANALYTICS_ENABLED": "false",
        "PREFECT__SERVER_EPHEMERAL": "true",  # only the services that a flow in progress needs
    }
    return subprocess.Popen(
        [sys.executable, "-m", services.PREFECT_SERVER, str(port), "--until-stdin-ends"],
        env=environment,
        stdin=subprocess.PIPE,  # ends with this process, however that ends
        stdout=log,
        stderr=subprocess.STDOUT,
        umask=PRIVATE_UMASK,
    )


def _wait(process: subprocess.Popen[bytes], api: str, secret: str, log: IO[bytes]) -> None:
    end = time.monotonic() + START_SECONDS
    while services.request_text(secret, f"{api}/health") is None:
        ended = process.poll() is not None
        if ended or time.monotonic() > end:
            log.seek(0)
            said = services.last_words(log.read().decode(errors="replace"))
            silent = f"did not answer for {START_SECONDS:.0f} s"
            raise EnvironmentNotReadyError(
                f"Prefect's temporary server {'ended' if ended else silent}.",
                why=said,
                next_command="qwen3ft run",
            )
        time.sleep(0.2)
