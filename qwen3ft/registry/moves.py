"""Which adapter was in use when: every promotion and rollback, as records. Pure; knows no MLflow.

A move is written down before an alias moves (`begun`) and again afterwards (`done`), so that a
crash between the two can be told from a move that was made: the champion itself says which it was.
`qwen3ft.registry.aliases` keeps the records in the registry and does the moving.
"""

from __future__ import annotations

import getpass
import socket
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from typing import Literal

from pydantic import Field, ValidationError

from qwen3ft.logs import get_logger
from qwen3ft.records.base import Record

MOVE_TAG_PREFIX = "qwen3ft.move."
"""Tags of a registered model: this and the move's number; the value is the move as JSON."""

MOST_SENTENCE_CHARACTERS = 1000
"""Of a verdict and of a reason: MLflow's database holds 5,000 characters in such a tag."""

logger = get_logger("history")


class Mover(Record):
    """Who or what moved an alias."""

    kind: Literal["flow", "person"]
    name: str = Field(description="The run's id, or user@host.")

    def __str__(self) -> str:
        return f"run {self.name}" if self.kind == "flow" else self.name


class Change(Record):
    """Why an alias is moved, and by whom."""

    by: Mover
    verdict: str = Field("", description="What the comparison found, in one sentence.")
    reason: str = Field("", description="In a person's own words.")


class Move(Record):
    """One promotion or rollback of a registered model."""

    number: int = Field(ge=1, description="Position in the history, from 1.")
    at: datetime = Field(default_factory=lambda: datetime.now(UTC))
    action: Literal["promotion", "rollback"]
    version: str = Field(description="In use from then on.")
    replaced: str | None = Field(None, description="In use until then.")
    run: str | None = Field(None, description="The run that trained `version`.")
    mlflow_run_id: str | None = None
    previous: str | None = Field(None, description="What a rollback leads to from then on.")
    previous_before: str | None = Field(None, description="What a rollback led to until then.")
    by: Mover
    verdict: str = ""
    reason: str = ""
    state: Literal["begun", "done"] = "begun"


class Aliases(Record):
    """The versions that the registry's three names stand for."""

    champion: str | None = Field(None, description="In use.")
    previous: str | None = Field(None, description="In use before it; where a rollback leads.")
    challenger: str | None = Field(None, description="The newest that was tested and kept.")


class History(Record):
    """Everything that `qwen3ft history` shows of one registered model."""

    registered_model: str
    aliases: Aliases
    moves: tuple[Move, ...] = Field((), description="Oldest first.")


def this_person() -> Mover:
    """Whoever runs this process."""
    try:
        user = getpass.getuser()
    except (KeyError, OSError):  # no such user in this container
        user = "unknown"
    return Mover(kind="person", name=f"{user}@{socket.gethostname()}")


def to_tag(move: Move) -> tuple[str, str]:
    """The tag that keeps a move; sentences are cut where MLflow would refuse them."""
    short = {
        field: _shortened(text)
        for field, text in (("verdict", move.verdict), ("reason", move.reason))
    }
    return tag_name(move.number), move.model_copy(update=short).model_dump_json()


def tag_name(number: int) -> str:
    """The name of the tag of move `number`."""
    return f"{MOVE_TAG_PREFIX}{number:06d}"


def from_tags(tags: Mapping[str, str]) -> list[Move]:
    """The moves that the tags of a registered model hold, oldest first.

    A tag that holds no move (edited by hand) is left out with a warning.
    """
    moves = []
    for name in sorted(name for name in tags if name.startswith(MOVE_TAG_PREFIX)):
        try:
            moves.append(Move.model_validate_json(tags[name]))
        except ValidationError as error:
            logger.warning("the tag %s holds no move: %s", name, error.errors()[0]["msg"])
    return moves


def completed_moves(moves: Sequence[Move], champion: str | None) -> list[Move]:
    """The moves that took place: one that only begun did if its version is in use."""
    return [
        move.model_copy(update={"state": "done"})
        for move in moves
        if move.state == "done" or move.version == champion
    ]


def succession(moves: Sequence[Move]) -> list[str]:
    """The versions that a chain of rollbacks would lead through, the one in use last.

    A promotion adds its version; a rollback takes away whatever came after the one it leads to.
    """
    versions: list[str] = []
    for move in moves:
        if move.replaced is not None and versions[-1:] != [move.replaced]:
            versions.append(move.replaced)  # in use before the history begins, or moved by hand
        if move.action == "promotion":
            versions.append(move.version)
            continue
        while versions and versions[-1] != move.version:
            versions.pop()
        versions = versions or [move.version]
    return versions


def _shortened(text: str) -> str:
    if len(text) <= MOST_SENTENCE_CHARACTERS:
        return text
    return text[: MOST_SENTENCE_CHARACTERS - 1] + "…"
