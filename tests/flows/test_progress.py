"""What `qwen3ft train` shows of a run in its own process: the log, and one line that moves."""

from __future__ import annotations

import io
import json
import logging
import time
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from prefect.logging.handlers import PrefectConsoleHandler

from flows.cli.output import open_console
from flows.cli.progress import training_progress
from qwen3ft.disk.files import write_json_atomic
from qwen3ft.jobs.folders import JobDir, RunDir
from qwen3ft.logs import PROGRESS_LOGGER
from qwen3ft.records.training import MemoryStatus, TrainingMetrics

MOST_SECONDS = 20.0


@pytest.fixture
def log() -> Iterator[io.StringIO]:
    """What Prefect's handler of the console prints of the loggers of a run."""
    stream, root = io.StringIO(), logging.getLogger()
    others = [one for one in root.handlers if isinstance(one, PrefectConsoleHandler)]
    for other in others:  # of flows that ran in this process
        root.removeHandler(other)
    handler = PrefectConsoleHandler(stream)
    root.addHandler(handler)
    yield stream
    root.removeHandler(handler)
    for other in others:
        root.addHandler(other)


def begin_attempt(run: RunDir, number: int) -> JobDir:
    """Make the folder of an attempt of 40 steps in 8 epochs."""
    job = run.attempt(number)
    job.path.mkdir(parents=True)
    write_json_atomic(job.request, {"total_steps": 40, "num_epochs": 8})
    return job


def train(job: JobDir, *steps: int) -> None:
    """Append the metrics of steps that took 3 s each, at once."""
    lines = [json.dumps(metrics_of(step).model_dump(mode="json")) + "\n" for step in steps]
    with job.metrics.open("a") as stream:
        stream.write("".join(lines))


def metrics_of(step: int) -> TrainingMetrics:
    """Return what a worker would write."""
    memory = MemoryStatus(
        allocated_gb=1.5, cached_gb=2.0, total_gb=13.0, available_gb=11.0, is_safe=True
    )
    return TrainingMetrics(
        epoch=step / 5,
        step=step,
        loss=1.0,
        learning_rate=1e-3,
        memory_usage=memory,
        timestamp=datetime(2026, 11, 26, tzinfo=UTC) + timedelta(seconds=3 * step),
    )


def wait_for(stream: io.StringIO, text: str) -> None:
    """Wait until `text` was shown."""
    end = time.monotonic() + MOST_SECONDS
    while text not in stream.getvalue():
        assert time.monotonic() < end, stream.getvalue()
        time.sleep(0.05)


@pytest.mark.parametrize("terminal", [True, False])
def test_progress_is_one_line_below_the_log(
    tmp_path: Path, log: io.StringIO, terminal: bool
) -> None:
    """Epoch, step, loss and time left; what earlier attempts of a resumed run did is not shown."""
    run, shown = RunDir(tmp_path / "a-run"), io.StringIO()
    train(begin_attempt(run, 1), 39)
    console = open_console(file=shown, force_terminal=terminal, width=160, no_color=True)
    with training_progress(console, tmp_path) as begin:
        begin("a-run")
        job = begin_attempt(run, 2)
        train(job, 1, 2)
        wait_for(shown, "epoch 0.4/8  loss 1.000")
        logging.getLogger("qwen3ft.train").warning("held-out loss 0.5")
        logging.getLogger(PROGRESS_LOGGER).warning("step 2/40")
        if terminal:
            wait_for(shown, "step 2/40")
            train(job, 3)
            wait_for(shown, "step 3/40")
    scrolled = shown if terminal else log
    assert "held-out loss 0.5" in scrolled.getvalue()
    assert "at most 1 min 54 s left" in shown.getvalue()
    assert "39/40" not in shown.getvalue()
    assert "step 2/40" not in log.getvalue()
    assert terminal or len(shown.getvalue().splitlines()) == 1
    logging.getLogger("qwen3ft.train").warning("afterwards")
    assert "afterwards" in log.getvalue()
