"""Progress of a run in this process, as `qwen3ft train` shows it beside the lines of the log."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from prefect.logging.handlers import PrefectConsoleHandler
from rich.console import Console

from flows.cli.tails import MetricsTail, tails_from_now
from flows.cli.views.run import RunView
from qwen3ft.jobs.folders import RunDir
from qwen3ft.logs import PROGRESS_LOGGER

POLL_SECONDS = 0.7


@contextmanager
def training_progress(console: Console, runs_dir: Path) -> Iterator[Callable[[str], None]]:
    """Show epoch, step, loss and time left while the body runs a flow in this process.

    On a terminal one line is redrawn below the log; elsewhere there is a line every 10 s.

    Args:
        console: Where to show it.
        runs_dir: The folder of runs.

    Yields:
        A function to be told the id of the run once it has begun.
    """
    done = threading.Event()
    threads: list[threading.Thread] = []
    with RunView(console) as view, _log_above(console):

        def begin(run_id: str) -> None:
            run = RunDir(runs_dir / run_id)
            tail, _ = tails_from_now(run)
            threads.append(threading.Thread(target=_show, args=(tail, view, done), daemon=True))
            threads[-1].start()

        try:
            yield begin
        finally:
            done.set()
            for thread in threads:
                thread.join()


def _show(tail: MetricsTail, view: RunView, done: threading.Event) -> None:
    while not done.wait(POLL_SECONDS):
        if tail.is_over():
            view.hide_progress()
        elif (progress := tail.newest()) is not None:
            view.progress(progress)


@contextmanager
def _log_above(console: Console) -> Iterator[None]:
    """Let the log scroll above the line that is redrawn, without what that line says itself."""
    handlers = [
        handler
        for handler in logging.getLogger().handlers
        if isinstance(handler, PrefectConsoleHandler)
    ]
    before = [handler.console for handler in handlers]
    for handler in handlers:
        handler.addFilter(_is_news)
        if console.is_terminal:
            handler.console = console
    try:
        yield
    finally:
        for handler, own in zip(handlers, before, strict=True):
            handler.removeFilter(_is_news)
            handler.console = own


def _is_news(record: logging.LogRecord) -> bool:
    if record.name.partition(".")[0] == "prefect":
        # of our hook, or of Ctrl-C, which the command speaks of itself
        is_of_cancelling = "aborted by an interrupt signal" in record.getMessage()
        return record.levelno > logging.INFO and not is_of_cancelling
    return record.name != PROGRESS_LOGGER
