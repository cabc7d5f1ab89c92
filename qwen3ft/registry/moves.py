"""The history of a registered model: every promotion and rollback, as records.

A move is written down before an alias moves (`begun`) and again afterwards (`done`). After a crash
between the two, the champion itself tells whether the move was made. `qwen3ft.registry.aliases`
keeps the records in the registry and moves the aliases.
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

MOVE_TAG_PREFIX = "mlflow.qwen3ft.move."
"""Prefix of a model's tags that hold its moves as JSON; the number of the move follows.

MLflow's pages hide tags that begin with "mlflow."; the model's description has the moves in words.
"""

EARLIER_TAG_PREFIX = "qwen3ft.move."
"""Prefix of the same tags in registries of earlier versions."""

TAG_PREFIXES = (MOVE_TAG_PREFIX, EARLIER_TAG_PREFIX)

NO_VERDICT = "Registered; its comparison has no verdict yet."
"""Description of a new version."""

ABOUT_ADAPTERS = (
    "LoRA adapters of one task, one version per run. **champion** is in use, **previous** is what "
    "`qwen3ft rollback` puts back, **challenger** is the newest that was kept out."
)

MOST_MOVES_DESCRIBED = 12
MOST_DESCRIBED_CHARACTERS = 250

MOST_SENTENCE_CHARACTERS = 1000
"""Longest verdict or reason kept; MLflow's database holds 5,000 characters in such a tag."""

logger = get_logger("history")


class Mover(Record):
    """Run, person or server that moved an alias."""

    kind: Literal["flow", "person", "server"]
    name: str = Field(description="Id of the run, user@host, or the server's host.")

    def __str__(self) -> str:
        prefix = {"flow": "run ", "person": "", "server": "the server on "}[self.kind]
        return f"{prefix}{self.name}"


class Change(Record):
    """Author of a move and the reason for it."""

    by: Mover
    verdict: str = Field("", description="Result of the comparison, in one sentence.")
    reason: str = Field("", description="Reason in a person's own words.")


class Move(Record):
    """One promotion or rollback of a registered model."""

    number: int = Field(ge=1, description="Position in the history, from 1.")
    at: datetime = Field(default_factory=lambda: datetime.now(UTC))
    action: Literal["promotion", "rollback"]
    version: str = Field(description="Version in use from then on.")
    replaced: str | None = Field(None, description="Version in use until then.")
    run: str | None = Field(None, description="Run that trained `version`.")
    mlflow_run_id: str | None = None
    previous: str | None = Field(None, description="Target of a rollback from then on.")
    previous_before: str | None = Field(None, description="Target of a rollback until then.")
    by: Mover
    verdict: str = ""
    reason: str = ""
    state: Literal["begun", "done"] = "begun"


class Aliases(Record):
    """Versions that the three aliases point at."""

    champion: str | None = Field(None, description="Version in use.")
    previous: str | None = Field(None, description="Version in use before; target of a rollback.")
    challenger: str | None = Field(None, description="Newest version tested and not promoted.")


class History(Record):
    """Aliases and moves of one registered model, as `qwen3ft history` shows them."""

    registered_model: str
    aliases: Aliases
    moves: tuple[Move, ...] = Field((), description="Oldest first.")


def this_person() -> Mover:
    """Return the person that runs this process."""
    try:
        user = getpass.getuser()
    except (KeyError, OSError):  # no such user in this container
        user = "unknown"
    return Mover(kind="person", name=f"{user}@{socket.gethostname()}")


def this_server() -> Mover:
    """Return the server that this process is."""
    return Mover(kind="server", name=socket.gethostname())


def to_tag(move: Move) -> tuple[str, str]:
    """Return name and value of the tag for a move; texts that MLflow would refuse are cut."""
    short = {"verdict": _shortened(move.verdict), "reason": _shortened(move.reason)}
    return tag_name(move.number), move.model_copy(update=short).model_dump_json()


def tag_name(number: int, prefix: str = MOVE_TAG_PREFIX) -> str:
    """Return the name of the tag for move `number`."""
    return f"{prefix}{number:06d}"


def from_tags(tags: Mapping[str, str]) -> list[Move]:
    """Return the moves in the tags of a registered model, oldest first.

    A tag that is not a valid move (edited by hand) is skipped with a warning.
    """
    moves = []
    for name in (name for name in tags if name.startswith(TAG_PREFIXES)):
        try:
            moves.append(Move.model_validate_json(tags[name]))
        except ValidationError as error:
            logger.warning("the tag %s is not a valid move: %s", name, error.errors()[0]["msg"])
    return sorted(moves, key=lambda move: move.number)


def completed_moves(moves: Sequence[Move], champion: str | None) -> list[Move]:
    """Return the moves that took place; one that only began did if its version is in use."""
    return [
        move.model_copy(update={"state": "done"})
        for move in moves
        if move.state == "done" or move.version == champion
    ]


def describe_history(history: History) -> str:
    """Return what a registered model is and how it was moved, newest first, as markdown."""
    lines = [ABOUT_ADAPTERS, ""]
    lines += [_in_words(move) for move in history.moves[::-1][:MOST_MOVES_DESCRIBED]]
    return "\n".join(lines)


def _in_words(move: Move) -> str:
    replaced = f" in place of version {move.replaced}" if move.replaced else ""
    done = "promoted" if move.action == "promotion" else "put back"
    why = " ".join((move.reason or move.verdict).split())
    text = f"- {move.at:%Y-%m-%d %H:%M}: version {move.version} {done}{replaced} by {move.by}"
    return f"{text}: {_shortened(why, MOST_DESCRIBED_CHARACTERS)}" if why else text


def succession(moves: Sequence[Move]) -> list[str]:
    """Return the versions that successive rollbacks would restore, the one in use last.

    A promotion adds its version; a rollback removes everything after its target.
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


def _shortened(text: str, most_characters: int = MOST_SENTENCE_CHARACTERS) -> str:
    return text if len(text) <= most_characters else text[: most_characters - 1] + "…"
