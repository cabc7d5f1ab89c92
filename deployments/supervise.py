"""Keeping the stack up: what ended by accident is started again, until somebody stops it.

For a service manager (see `deployments.unit`), and for a terminal that stays open.
"""

from __future__ import annotations

import signal
import threading
from types import FrameType

from deployments.stack import Say, Stack
from qwen3ft.errors import EnvironmentNotReadyError

LOOK_SECONDS = 3.0
"""Between two looks. A run that lost its worker is waiting for this."""


def stay_up(stack: Stack, say: Say) -> None:
    """Keep the stack up until SIGTERM or Ctrl-C, which stop it, or until `qwen3ft down`.

    Raises:
        EnvironmentNotReadyError: it cannot be started at all; later trouble is said, and tried
            again.
    """
    ended = threading.Event()

    def end(_number: int, _frame: FrameType | None) -> None:
        ended.set()

    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, end)
    stack.up(say)
    while not ended.wait(LOOK_SECONDS):
        try:
            if not stack.keep_up(say):
                say("Stopped by qwen3ft down.")
                return
        except EnvironmentNotReadyError as error:
            say(f"{error.what} Trying again in {LOOK_SECONDS:.0f} s.")
    stack.down(say)
