"""The folders of a run: the interface between the flow's process and its workers.

    runs/<run_id>/
      run.jsonl                    log records of the flow's process
      run.lock                     held by that process while the run is in progress
      jobs/<kind>/                 one per worker that is not a training attempt; also with ranks/
      attempts/01/                 one per training attempt
        plan.json  metrics.jsonl  memory.jsonl  heartbeat  worker.log
        memory/{peak.json, resident.txt, summary.txt, snapshot.pickle}
        checkpoints/step-000200/{..., manifest.json last}
        ranks/<rank>/              one per rank of several: heartbeat, logs, memory, its own end
        hosts/<host>/              one per further host: log, signs of life, its own end
        failure.json | outcome.json last

A worker is given one folder: it reads its request there and leaves its result there.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar
from urllib.parse import urlsplit

from pydantic import BaseModel, ValidationError

from qwen3ft.disk.files import lines_from, make_folder, write_json_atomic
from qwen3ft.logs import get_logger
from qwen3ft.records.training import Failure
from qwen3ft.settings import with_partners
from qwen3ft.text.commands import shell_line

logger = get_logger("jobs")

RecordT = TypeVar("RecordT", bound=BaseModel)

_ATTEMPT = re.compile(r"[0-9]{2}|[1-9][0-9]{2,}")


@dataclass(frozen=True)
class JobDir:
    """One worker's folder."""

    path: Path

    @property
    def request(self) -> Path:
        """Request to the worker (JSON)."""
        return self.path / "plan.json"

    @property
    def outcome(self) -> Path:
        """Result of a completed job; written last."""
        return self.path / "outcome.json"

    @property
    def failure(self) -> Path:
        """Reason why it ended without an outcome."""
        return self.path / "failure.json"

    @property
    def metrics(self) -> Path:
        """One `TrainingMetrics` per line."""
        return self.path / "metrics.jsonl"

    @property
    def memory(self) -> Path:
        """One `MemoryStatus` with step and time per line."""
        return self.path / "memory.jsonl"

    @property
    def memory_report(self) -> Path:
        """Folder of the report on memory in use: see `qwen3ft.machine.memory_report`."""
        return self.path / "memory"

    @property
    def heartbeat(self) -> Path:
        """Touched while the worker makes progress; holds {phase, step}."""
        return self.path / "heartbeat"

    @property
    def log(self) -> Path:
        """Everything the worker printed, log records included."""
        return self.path / "worker.log"

    @property
    def checkpoints(self) -> Path:
        """Folder of `step-000200` folders."""
        return self.path / "checkpoints"

    @property
    def questions(self) -> Path:
        """One `Question` per line, appended by the command that asks."""
        return self.path / "questions.jsonl"

    @property
    def pieces(self) -> Path:
        """One `Chunk` per line, appended by the worker that answers."""
        return self.path / "pieces.jsonl"

    @property
    def stop(self) -> Path:
        """Exists once an answer is no longer wanted."""
        return self.path / "stop"

    def rank(self, rank: int) -> JobDir:
        """Return the folder of a rank, where several share the job."""
        return JobDir(self.path / "ranks" / str(rank))

    def host(self, host: int) -> JobDir:
        """Return the folder of a host's agent, where several share the job; 0 is the job's own."""
        return JobDir(self.path / "hosts" / str(host)) if host else self

    @property
    def alive(self) -> Path:
        """Changes while a host's agent runs, even if its ranks make no progress."""
        return self.path / "alive"

    @property
    def meeting_place(self) -> Path:
        """File through which the ranks find each other."""
        return self.path / "ranks" / "meeting-place"

    def ranks(self) -> list[JobDir]:
        """Return the folders of all ranks, in order; none if the job has one process."""
        numbers = (path.name for path in (self.path / "ranks").glob("[0-9]*"))
        return [self.rank(number) for number in sorted(map(int, numbers))]

    def claim(self) -> bool:
        """Make the folder; return False if another process, of any host, has made it."""
        make_folder(self.path.parent, 0o700)
        try:
            self.path.mkdir(mode=0o700)
        except FileExistsError:
            return False
        return True

    def create(self, request: BaseModel) -> JobDir:
        """Create the folder and write the request into it."""
        make_folder(self.path, 0o700)
        write_record(self.request, request)
        return self

    def read_failure(self) -> Failure | None:
        """Return the recorded failure, if there is one."""
        return read_record(self.failure, Failure) if self.failure.exists() else None


@dataclass(frozen=True)
class RunDir:
    """One run's folder."""

    path: Path

    @property
    def log(self) -> Path:
        """Log records of the flow's process, one JSON object a line."""
        return self.path / "run.jsonl"

    @property
    def config(self) -> Path:
        """Settings of the run; a run without them has not begun."""
        return self.path / "config.json"

    @property
    def resume_command(self) -> str:
        """Command that continues the run, typed in the project folder."""
        return self.command_to_resume()

    def command_to_resume(self, **changes: object) -> str:
        """Return the command that continues the run with some settings changed.

        On servers other than the project's own it is that of a run there: of several hosts any
        may carry it out, as they share the folder.
        """
        if self.path.parent != Path("runs").resolve():
            changes = {"runs_dir": self.path.parent, **changes}
        own = _is_own_server(os.environ.get("PREFECT_API_URL", ""))
        settings = self._settings()
        hosts = changes.get("hosts", settings.get("hosts", 1))
        if not own and str(hosts) != "1":  # a text, if it comes from a printed command
            words = ["prefect", "deployment", "run", "qwen3-finetune/default"]
            given = {"continue_run": self.path.name}
            if changes:
                given["config"] = json.dumps(with_partners(changes, settings), default=str)
            return shell_line(*words, *_options("--param", given))
        words = ["qwen3ft", "run" if own else "train", "--resume", self.path.name]
        return shell_line(*words, *_options("--set", changes))

    def _settings(self) -> dict[str, Any]:
        try:
            values = json.loads(self.config.read_text(encoding="utf-8"))
        except (OSError, ValueError):  # not begun, or damaged
            return {}
        return values if isinstance(values, dict) else {}

    def command_to_train_again(self, **changes: float) -> str:
        """Return the command of a new run with this one's settings, some of them changed."""
        texts = {name: f"{value:g}" for name, value in changes.items()}
        words = _options("--set", texts)
        return shell_line("qwen3ft", "train", "--config", self.config, *words)

    @property
    def lock(self) -> Path:
        """Lock file that the flow's process holds; see `qwen3ft.disk.locks`."""
        return self.path / "run.lock"

    def job(self, kind: str) -> JobDir:
        """Return the folder of the worker `kind` (not a training attempt)."""
        return JobDir(self.path / "jobs" / kind)

    def attempt(self, number: int) -> JobDir:
        """Return the folder of training attempt `number`, from 1."""
        return JobDir(self.path / "attempts" / f"{number:02d}")

    def attempts(self) -> list[JobDir]:
        """Return the folders of all attempts made so far, in order."""
        return [self.attempt(number) for number in self._numbers()]

    def next_attempt(self) -> int:
        """Return the number of the attempt after all made so far."""
        return max(self._numbers(), default=0) + 1

    def _numbers(self) -> list[int]:
        folder = self.path / "attempts"
        names = (path.name for path in folder.iterdir()) if folder.is_dir() else ()
        return sorted(int(name) for name in names if _ATTEMPT.fullmatch(name))


def _is_own_server(url: str) -> bool:
    """Return True if a Prefect server is the project's own, or none: it listens on loopback."""
    try:
        host = urlsplit(url).hostname
    except ValueError:  # it is no URL, as http://[::1
        return False
    return host in {None, "127.0.0.1", "localhost"}


def _options(option: str, values: Mapping[str, object]) -> list[str]:
    return [word for name, value in values.items() for word in (option, f"{name}={value}")]


def write_record(path: Path, record: BaseModel) -> None:
    """Write a record as JSON, atomically and durably."""
    write_json_atomic(path, record.model_dump(mode="json"))


def read_record(path: Path, kind: type[RecordT]) -> RecordT:
    """Read a record written by `write_record`."""
    return kind.model_validate(json.loads(path.read_text(encoding="utf-8")))


def parse_record(line: bytes, kind: type[RecordT]) -> RecordT | None:
    """Parse one line of JSON; None, with a warning, if it is not a record of that kind."""
    try:
        return kind.model_validate_json(line)
    except ValidationError:
        logger.warning("an unreadable line of %s is skipped", kind.__name__)
        return None


def read_records(path: Path, kind: type[RecordT]) -> list[RecordT]:
    """Read a file with one record a line; unreadable lines are skipped."""
    parsed = (parse_record(line.content, kind) for line in lines_from(path, ended=True))
    return [record for record in parsed if record is not None]
