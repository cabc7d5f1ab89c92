"""Reads points, figures and tables for MLflow from a run's files; an unreadable line is skipped."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from datetime import UTC, datetime
from pathlib import Path

from qwen3ft.disk.files import lines_from
from qwen3ft.errors import RejectedError
from qwen3ft.jobs.folders import RunDir, parse_record, read_records
from qwen3ft.logs import get_logger, mask_values
from qwen3ft.records.data import DatasetManifest
from qwen3ft.records.plan import MemoryPart
from qwen3ft.records.training import TrainingMetrics
from qwen3ft.report.figures import (
    AttemptMemory,
    MemorySample,
    lengths_figure,
    loss_figure,
    memory_figure,
    write_png,
)
from qwen3ft.text.commands import shell_line
from qwen3ft.tracking.connection import Point
from qwen3ft.tracking.cursor import operations
from qwen3ft.tracking.journal import AttemptEnded, AttemptStarted, DatasetInput, Metrics
from qwen3ft.tracking.run_metrics import CURVES

_log = get_logger("tracking")


def operation_points(operation: Metrics) -> list[Point]:
    """Return the points of a journaled operation, all at its time and step."""
    return [
        Point(key, value, operation.time_ms, operation.step)
        for key, value in operation.values.items()
    ]


def training_points(line: bytes) -> list[Point]:
    """Return the points of one line of metrics.jsonl; none if it is unreadable."""
    measured = parse_record(line, TrainingMetrics)
    if measured is None:
        return []
    values = {
        "train/loss": measured.loss,
        "train/learning_rate": None if measured.loss is None else measured.learning_rate,
        "train/grad_norm": measured.grad_norm,
        "train/tokens_per_second": measured.tokens_per_second,
        "held_out/loss": measured.held_out_loss,
    }
    return _points(values, measured.timestamp, measured.step)


def memory_points(line: bytes) -> list[Point]:
    """Return the points of one line of memory.jsonl, in GB; none if it is unreadable."""
    sample = parse_record(line, MemorySample)
    if sample is None:
        return []
    values = {
        "memory/allocated_gb": sample.allocated_gb,
        "memory/cached_gb": sample.cached_gb,
        "memory/available_gb": sample.available_gb,
        "memory/process_gb": sample.process_gb,
    }
    return _points(values, sample.timestamp, sample.step)


def curve_points(points: Iterable[Point]) -> list[Point]:
    """Return those points of an attempt that are also drawn as curves of its run."""
    return [point for point in points if point.key in CURVES]


def _points(values: Mapping[str, float | None], time: datetime, step: int) -> list[Point]:
    time_ms = int(time.timestamp() * 1000)
    return [Point(key, value, time_ms, step) for key, value in values.items() if value is not None]


def draw_attempt(run_dir: RunDir, number: int, folder: Path) -> list[Path]:
    """Write loss.png and memory.png of an attempt into `folder`, each if there is data for it."""
    drawn = []
    if metrics := read_records(run_dir.attempt(number).metrics, TrainingMetrics):
        drawn.append(write_png(loss_figure(metrics), folder / "loss.png"))
    if memory := [attempt for attempt in attempts_memory(run_dir) if attempt.number == number]:
        drawn.append(write_png(memory_figure(memory), folder / "memory.png"))
    return drawn


def draw_memory(run_dir: RunDir, folder: Path) -> list[Path]:
    """Write memory.png of all attempts into `folder`, if there was one."""
    attempts = attempts_memory(run_dir)
    return [write_png(memory_figure(attempts), folder / "memory.png")] if attempts else []


def attempts_memory(run_dir: RunDir) -> list[AttemptMemory]:
    """Read budget, prediction, measurements and end of each attempt in the journal."""
    found: dict[int, AttemptMemory] = {}
    for operation in operations(run_dir):
        if isinstance(operation, AttemptStarted):
            found[operation.number] = AttemptMemory(
                number=operation.number,
                started=_moment(operation.time_ms),
                budget_gb=operation.budget_gb,
                predicted=_predicted(operation.plan),
                samples=tuple(read_records(run_dir.attempt(operation.number).memory, MemorySample)),
            )
        elif isinstance(operation, AttemptEnded) and operation.number in found:
            failed = None if operation.status == "FINISHED" else operation.status
            end = {
                "ended": _moment(operation.time_ms),
                "measured_seconds": operation.seconds,
                "failure": operation.tags.get("failure", failed),
            }
            found[operation.number] = found[operation.number].model_copy(update=end)
    return [found[number] for number in sorted(found)]


def _predicted(plan: str) -> tuple[MemoryPart, ...]:
    try:
        parts = json.loads(plan)["predicted"]
        return tuple(MemoryPart.model_validate(part) for part in parts)
    except (ValueError, KeyError, TypeError):
        _log.warning("A journaled plan has no readable prediction.")
        return ()


def _moment(time_ms: int) -> datetime:
    return datetime.fromtimestamp(time_ms / 1000, UTC)


def draw_lengths(dataset: DatasetInput, folder: Path) -> list[Path]:
    """Write lengths.png of the training rows into `folder`, if their lengths are known."""
    values = {"sources": (), **json.loads(dataset.profile)}
    manifest = DatasetManifest.model_validate(values)
    if not manifest.length_histogram:
        return []
    figure = lengths_figure(manifest.length_histogram, manifest.max_sequence_length)
    return [write_png(figure, folder / "lengths.png")]


def table_json(path: Path) -> str:
    """Return a file of JSON lines in the form that MLflow shows as a table.

    Raises:
        RejectedError: the file is unreadable or has no rows.
    """
    try:
        rows = [json.loads(line.content) for line in lines_from(path, ended=True)]
        columns = list(dict.fromkeys(key for row in rows for key in row))
        data = [[row.get(column) for column in columns] for row in rows]
    except (OSError, ValueError, TypeError, AttributeError) as error:
        raise RejectedError(
            f"{path} is not a table: {error}",
            why="It was cut off, or changed since the run wrote it; MLflow goes on without it.",
            next_command=shell_line("ls", "-l", path.parent),
        ) from error
    if not rows:
        raise RejectedError(
            f"{path} has no rows.",
            why="The run wrote none, and MLflow shows no empty table.",
            next_command=shell_line("ls", "-l", path.parent),
        )
    return json.dumps(mask_values({"columns": columns, "data": data}), ensure_ascii=False)
