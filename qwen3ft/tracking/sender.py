"""Sends a run's journal and its attempts' metrics to MLflow, one step at a time, without retries.

The cursor only moves past what MLflow has confirmed, so nothing is lost, whatever MLflow or this
process does in between. After a crash the last step may be repeated: runs are found again rather
than created twice, and points, tags and files overwrite themselves. A run that MLflow has forgotten
is sent again in full. Whatever MLflow refuses for good is logged and skipped.
"""

from __future__ import annotations

import json
import posixpath
import tempfile
from itertools import islice
from pathlib import Path

from qwen3ft.disk.files import Line, fsync_file, lines_from, sha256_json
from qwen3ft.errors import RejectedError, TrackingUnavailableError
from qwen3ft.faults import reach
from qwen3ft.jobs.folders import RunDir
from qwen3ft.logs import get_logger
from qwen3ft.text.commands import shell_line
from qwen3ft.tracking.checksums import has_checksums
from qwen3ft.tracking.connection import Connection, connect
from qwen3ft.tracking.cursor import AttemptCursor, TrackingState, read_state, write_state
from qwen3ft.tracking.journal import (
    PARENT_RUN,
    AnyOperation,
    Artifacts,
    AttemptEnded,
    AttemptStarted,
    DatasetInput,
    Metrics,
    RunFinished,
    RunStarted,
    Table,
    Tags,
    TextArtifact,
    journal_path,
    parse_operation,
)
from qwen3ft.tracking.points import (
    curve_points,
    draw_attempt,
    draw_lengths,
    draw_memory,
    memory_points,
    operation_points,
    table_json,
    training_points,
)

_LINES_PER_BATCH = 200  # of at most five metrics each: MLflow takes 1000 a request

_log = get_logger("tracking")


class Sender:
    """Sends one thing at a time, in order, and moves the cursor past it.

    `qwen3ft.tracking.mirror` keeps two processes from sending one run.
    """

    def __init__(self, run_dir: RunDir, tracking_uri: str) -> None:
        self.run_dir = run_dir
        self.tracking_uri = tracking_uri
        self.state = read_state(run_dir)
        self.connection: Connection | None = None

    def step(self) -> bool:
        """Send the next operation, or a batch of each attempt's lines; False if all is sent.

        Raises:
            TrackingUnavailableError: nothing was sent; the same call may succeed later.
        """
        try:
            connection = self._connected()
            line = next(lines_from(journal_path(self.run_dir), self.state.journal_offset), None)
            if line is not None:
                self._send_operation(connection, line)
                return True
            return any(self._send_lines(connection, number) for number in self.state.attempts)
        except TrackingUnavailableError:
            self.connection = None  # once it is back, check again what it has
            raise
        except (OSError, ImportError) as error:  # the run's own disk, or a broken installation
            raise TrackingUnavailableError(
                f"Tracking of {self.run_dir.path} is stuck: {type(error).__name__}: {error}",
                why="The local disk is full or unreadable, or MLflow is not installed completely.",
                next_command="qwen3ft doctor",
            ) from error

    def send_all(self) -> None:
        """Send everything that MLflow lacks.

        Raises:
            TrackingUnavailableError: something was not sent.
        """
        while self.step():
            pass

    def _connected(self) -> Connection:
        if self.connection is None:
            connection = connect(self.tracking_uri)
            known = [cursor.run_id for cursor in self.state.attempts.values()]
            known += [self.state.parent_run_id] if self.state.parent_run_id else []
            if not all(connection.has_run(run_id) for run_id in known):
                _log.warning("MLflow does not know this run any more; it is sent again in full.")
                self.state = TrackingState()
            self.state.experiment_id = connection.experiment_id
            self.connection = connection
        return self.connection

    def _send_operation(self, connection: Connection, line: Line) -> None:
        path = journal_path(self.run_dir)
        try:
            operation = parse_operation(line.content, sealed=has_checksums(path))
        except ValueError as error:
            start = line.end_offset - len(line.content)
            number = 1 + path.read_bytes()[:start].count(b"\n")
            _log.warning("Line %d of %s (byte %d) is skipped: %s.", number, path, start, error)
        else:
            self._apply_or_skip(connection, operation)
        reach("cursor.sent")
        fsync_file(path)  # the cursor must never be ahead of the journal
        self.state.journal_offset = line.end_offset
        write_state(self.run_dir, self.state)

    def _apply_or_skip(self, connection: Connection, operation: AnyOperation) -> None:
        try:
            self._apply(connection, operation)
        # a figure that cannot be drawn raises the latter two
        except (RejectedError, ValueError, TypeError) as error:
            _log.warning("Tracking of '%s' is skipped. %s", operation.kind, error)

    def _apply(self, connection: Connection, operation: AnyOperation) -> None:
        if isinstance(operation, RunStarted):
            self._start_run(connection, operation)
            return
        parent = self._parent(connection, operation.time_ms)
        match operation:
            case AttemptStarted():
                self._start_attempt(connection, parent, operation)
            case AttemptEnded():
                self._end_attempt(connection, parent, operation)
            case Metrics():
                connection.log(parent, points=operation_points(operation))
            case Tags():
                values = operation.values.items()
                tags = {name: value.replace(PARENT_RUN, parent) for name, value in values}
                connection.log(parent, tags=tags)
            case DatasetInput():
                connection.log_dataset(parent, operation)
                with tempfile.TemporaryDirectory(prefix="qwen3ft-") as folder:
                    for path in draw_lengths(operation, Path(folder)):
                        connection.upload(parent, path, "figures")
            case TextArtifact():
                _upload_text(connection, parent, operation.path, operation.content)
            case Artifacts():
                connection.upload(parent, Path(operation.local_path), operation.artifact_path)
            case Table():
                self._log_table(connection, parent, operation)
            case RunFinished():
                connection.set_status(parent, operation.status, operation.time_ms)

    def _start_run(self, connection: Connection, operation: RunStarted) -> None:
        if self.state.parent_run_id is None:
            self.state.parent_run_id = connection.find_or_create_run(
                operation.name, operation.time_ms, {"qwen3ft.uid": operation.uid}, operation.tags
            )
        else:
            connection.set_status(self.state.parent_run_id, "RUNNING")
            connection.log(self.state.parent_run_id, tags=operation.tags)
        connection.log(self.state.parent_run_id, params=operation.params)

    def _parent(self, connection: Connection, time_ms: int) -> str:
        if self.state.parent_run_id is None:  # its start was unreadable or refused
            identity = {"qwen3ft.uid": sha256_json(str(self.run_dir.path))}
            self.state.parent_run_id = connection.find_or_create_run(
                self.run_dir.path.name, time_ms, identity, {}
            )
        return self.state.parent_run_id

    def _start_attempt(self, connection: Connection, parent: str, op: AttemptStarted) -> None:
        cursor = self.state.attempts.get(op.number)
        if cursor is None:
            identity = {"mlflow.parentRunId": parent, "qwen3ft.attempt": str(op.number)}
            run_id = connection.find_or_create_run(f"attempt-{op.number}", op.time_ms, identity, {})
            cursor = AttemptCursor(run_id=run_id)
            self.state.attempts[op.number] = cursor
        connection.set_status(cursor.run_id, "RUNNING")
        _upload_text(connection, cursor.run_id, "plan.json", op.plan)
        connection.log(cursor.run_id, params=op.params)

    def _end_attempt(self, connection: Connection, parent: str, op: AttemptEnded) -> None:
        cursor = self.state.attempts.get(op.number)
        if cursor is None:
            raise RejectedError(
                f"Attempt {op.number} ended but never started.",
                why="The line of the journal that began it is damaged.",
                next_command=shell_line("ls", "-l", self.run_dir.path),
            )
        while self._send_lines(connection, op.number, ended=True):
            pass
        connection.log(cursor.run_id, tags=op.tags)
        connection.set_status(cursor.run_id, op.status, op.time_ms)
        with tempfile.TemporaryDirectory(prefix="qwen3ft-") as folder:
            for path in draw_attempt(self.run_dir, op.number, Path(folder)):
                connection.upload(cursor.run_id, path, "figures")
                connection.upload(parent, path, "figures")  # the last attempt's stay there
            for path in draw_memory(self.run_dir, Path(folder)):  # memory.png shows all attempts
                connection.upload(parent, path, "figures")
        if (report := self.run_dir.attempt(op.number).memory_report).is_dir():
            connection.upload(cursor.run_id, report, "memory")

    def _log_table(self, connection: Connection, parent: str, table: Table) -> None:
        """Log a table as MLflow's `log_table` would, which appends and so must not be repeated."""
        _upload_text(connection, parent, table.path, table_json(Path(table.local_path)))
        self.state.tables = sorted({*self.state.tables, table.path})
        logged = [{"path": path, "type": "table"} for path in self.state.tables]
        connection.log(parent, tags={"mlflow.loggedArtifacts": json.dumps(logged)})

    def _send_lines(self, connection: Connection, number: int, *, ended: bool = False) -> bool:
        """Send the next batch of an attempt's metrics and memory; False if there was none."""
        cursor, job = self.state.attempts[number], self.run_dir.attempt(number)
        metrics, memory = (
            list(islice(lines_from(path, offset, ended=ended), _LINES_PER_BATCH))
            for path, offset in (
                (job.metrics, cursor.metrics_offset),
                (job.memory, cursor.memory_offset),
            )
        )
        if not metrics and not memory:
            return False
        for points in (
            [point for line in metrics for point in training_points(line.content)],
            [point for line in memory for point in memory_points(line.content)],
        ):
            try:
                connection.log(cursor.run_id, points=points)
                if self.state.parent_run_id is not None:
                    connection.log(self.state.parent_run_id, points=curve_points(points))
            except RejectedError as error:
                _log.warning("%d points of attempt %d are skipped. %s", len(points), number, error)
        cursor.metrics_offset = metrics[-1].end_offset if metrics else cursor.metrics_offset
        cursor.memory_offset = memory[-1].end_offset if memory else cursor.memory_offset
        write_state(self.run_dir, self.state)
        return True


def _upload_text(connection: Connection, run_id: str, artifact: str, content: str) -> None:
    parent, name = posixpath.split(artifact)
    with tempfile.TemporaryDirectory(prefix="qwen3ft-") as folder:
        local = Path(folder) / name
        local.write_text(content, encoding="utf-8")
        connection.upload(run_id, local, parent or None)
