"""What passes between the commands that ask a model and the worker that answers.

<job>/questions.jsonl   one `Asking` a line, appended by the command; the last says `end`
<job>/pieces.jsonl      one `Piece` a line, appended by the worker as it writes
<job>/stop              there once an answer is not wanted any more
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

from pydantic import Field

from qwen3ft.config import TrainingConfig
from qwen3ft.jobs.folders import JobDir
from qwen3ft.records.base import Record


class AskRequest(Record):
    """Load an adapter on its 4-bit base and answer what is asked; the outcome is `AskOutcome`."""

    config: TrainingConfig
    adapter: str
    device: Literal["cuda", "cpu"]
    thinking: bool = Field(description="Whether it is asked to think first.")


class Asking(Record):
    """One question, as the messages so far; or the end of asking."""

    messages: tuple[dict[str, Any], ...] = ()
    end: bool = False


class Piece(Record):
    """What the worker tells, as it happens: 'ready' once; pieces of text; 'end' of each answer."""

    kind: Literal["ready", "thinking", "answer", "end"]
    text: str = ""
    tokens: int = Field(0, description="Of the whole answer, with 'end'.")
    stopped: bool = Field(True, description="With 'end': by the end token, not by the limit.")


class AskOutcome(Record):
    """A worker that was told that nothing more is asked."""

    answered: int


def questions_path(job: JobDir) -> Path:
    """Where the command asks."""
    return job.path / "questions.jsonl"


def pieces_path(job: JobDir) -> Path:
    """Where the worker answers."""
    return job.path / "pieces.jsonl"


def stop_path(job: JobDir) -> Path:
    """There once nothing more is wanted."""
    return job.path / "stop"
