"""The figure of a run's memory shows budget, prediction and measurements."""

from __future__ import annotations

from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
from support.reported_run import START, make_memory, make_parts

from qwen3ft.report.figures import AttemptMemory, attempt_minutes, memory_figure, write_png


def make_attempt(number: int, after_seconds: float, **changes: Any) -> AttemptMemory:
    """Return an attempt of 100 s that starts `after_seconds` after the run."""
    values = {"predicted": make_parts(weights=1.5, activations=1.25), "beside_gb": 0.5}
    return make_memory(number, after_seconds, **{**values, **changes})


def texts(axes: Any) -> list[str]:
    return [text.get_text() for text in axes.texts]


def test_one_picture_shows_budget_prediction_and_reality(tmp_path: Path) -> None:
    """It has three curves, the budget, a stack for each plan, and each attempt's outcome."""
    attempts = [
        make_attempt(1, 0, failure="OutOfMemoryError"),
        make_attempt(2, 110, failure="MemoryLeakError", predicted=make_parts(weights=1.5)),
        make_attempt(3, 220, predicted=make_parts(weights=1.5)),
    ]
    figure = memory_figure(attempts)
    curves, bars = figure.axes
    legend = [text.get_text() for text in curves.get_legend().get_texts()]
    whole = ["whole process", "held by the allocator", "in use"]
    assert legend == [*whole, "predicted peak", "budget 4.00 GB"]
    assert texts(curves) == ["1: OutOfMemoryError", "2: MemoryLeakError", "3: completed"]
    by_label = {line.get_label(): line for line in curves.lines}
    assert max(by_label["whole process"].get_ydata()) == pytest.approx(1.99 + 0.5)
    labels = [label.get_text() for label in bars.get_xticklabels()]
    assert labels == ["attempt\n1", "attempt\n2 to 3"]
    assert texts(bars) == ["2.75", "1.50"]
    stacked = [(patch.get_y(), patch.get_height()) for patch in bars.patches]
    assert stacked == [(0.0, 1.5), (0.0, 1.5), (1.5, 1.25), (1.5, 0.0)]
    assert write_png(figure, tmp_path / "memory.png").read_bytes()[:4] == b"\x89PNG"


def test_a_run_that_is_continued_days_later_stays_readable() -> None:
    """A pause counts as a minute at most; attempts never overlap."""
    spans = attempt_minutes([make_attempt(1, 0), make_attempt(2, 130), make_attempt(3, 3 * 86400)])
    for span, seconds in zip(spans, [(0, 100), (130, 230), (290, 390)], strict=True):
        assert span == pytest.approx([second / 60 for second in seconds])


def test_an_attempt_without_measurements_is_drawn_too(tmp_path: Path) -> None:
    """Its prediction and its outcome are there, even if it failed while loading."""
    attempt = make_attempt(1, 0, samples=(), failure="OutOfMemoryError")
    curves, bars = memory_figure([attempt]).axes
    assert texts(curves) == ["1: OutOfMemoryError"]
    assert texts(bars) == ["2.75"]
    bare = AttemptMemory(number=1, started=START)
    curves, bars = memory_figure([bare]).axes
    assert texts(curves) == ["1: running"]
    write_png(memory_figure([bare]), tmp_path / "bare.png")


def test_many_small_parts_are_drawn_as_one() -> None:
    """The sum stays right."""
    parts = make_parts(**{f"part{i}": 0.1 * (20 - i) for i in range(20)})
    _, bars = memory_figure([make_attempt(1, 0, predicted=parts)]).axes
    names = [text.get_text() for text in bars.get_legend().get_texts()]
    assert names[0] == "other parts"
    assert len(names) == 10
    assert sum(patch.get_height() for patch in bars.patches) == pytest.approx(21.0)


@pytest.mark.parametrize("jump_seconds", [3600, -3600])
def test_a_clock_that_is_set_moves_no_attempt(tmp_path: Path, jump_seconds: int) -> None:
    """The measured duration counts; readings stay within their attempt, and the picture is made."""
    jump = timedelta(seconds=jump_seconds)
    attempt = make_attempt(1, 0)
    moved = [
        sample.model_copy(update={"timestamp": sample.timestamp + jump})
        for sample in attempt.samples[1:]
    ]
    changed = attempt.model_copy(
        update={
            "samples": (attempt.samples[0], *moved),
            "ended": attempt.started + jump + timedelta(seconds=100),
            "measured_seconds": 100.0,
        }
    )
    assert changed.seconds == 100.0
    minutes = changed.minutes(2.0)
    assert len(minutes) == len(attempt.samples)
    assert all(2.0 <= minute <= 2.0 + 100 / 60 for minute in minutes)
    assert attempt_minutes([changed, make_attempt(2, 110)])[0] == (0.0, 100 / 60)
    assert write_png(memory_figure([changed]), tmp_path / "memory.png").stat().st_size > 0
