"""Moves the aliases of one registered model: champion, previous, challenger.

MLflow has no compare-and-set, so the caller holds a lock (`bounded_calls.move`). It holds on this
machine only: promoters on two machines may both win within milliseconds, and the later one stays. A
move is recorded before and after (see `qwen3ft.registry.moves`); `settle` finishes or undoes what a
crash left in between, before anything else is moved.
"""

from __future__ import annotations

from typing import Any, Literal

from qwen3ft.errors import (
    ChampionChangedError,
    NotInMlflowError,
    RejectedError,
    RequestError,
    RolledBackError,
    TrackingUnavailableError,
)
from qwen3ft.faults import reach
from qwen3ft.logs import get_logger
from qwen3ft.registry.moves import (
    ABOUT_ADAPTERS,
    EARLIER_TAG_PREFIX,
    NO_VERDICT,
    TAG_PREFIXES,
    Aliases,
    Change,
    History,
    Move,
    completed_moves,
    describe_history,
    from_tags,
    succession,
    tag_name,
    to_tag,
)
from qwen3ft.text.commands import shell_line
from qwen3ft.tracking.connection import Connection

logger = get_logger("registry")

CHAMPION, PREVIOUS, CHALLENGER = "champion", "previous", "challenger"

DIGEST_TAG = "adapter_sha256"
"""Version tag: sha256 of its adapter_model.safetensors."""

RUN_TAG = "run"
"""Version tag: the run that trained it."""

VERDICT_TAG = "verdict"
"""Version tag: result of its comparison, in one sentence."""

ROLLED_BACK_TAG = "rolled_back"
"""Version tag: reason why it was rolled back. No flow promotes it, or the same bytes, again."""


TRIAL_TAG = "trial"
"""Version tag: outcome of its trial on a share of the requests, in one sentence."""


def read_history(connection: Connection, name: str) -> History:
    """Return the versions in use and their history; empty for an unknown model."""
    try:
        with connection.calls() as client:
            model = client.get_registered_model(name)
    except NotInMlflowError:
        return History(registered_model=name, aliases=Aliases())
    aliases = {alias: str(version) for alias, version in model.aliases.items()}
    named = Aliases(**{name: aliases.get(name) for name in Aliases.model_fields})
    moves = completed_moves(from_tags(model.tags), named.champion)
    return History(registered_model=name, aliases=named, moves=tuple(moves))


def make_champion(
    connection: Connection, name: str, version: str, expected: str | None, change: Change
) -> Move | None:
    """Make `version` the champion; return None if it already is.

    Raises:
        ChampionChangedError: the champion is not `expected`.
        RolledBackError: a flow would promote a version that was rolled back.
        RequestError: there is no such version.
    """
    history = settle(connection, name)
    champion = history.aliases.champion
    if champion == version:
        return None
    wanted = require_version(connection, name, version)
    if champion != expected:
        raise _changed(name, f"{version} is not promoted", champion, expected)
    if change.by.kind == "flow":
        _refuse_rolled_back(connection, name, wanted)
    if change.verdict:
        with connection.calls() as client:
            _set_verdict(client, name, version, change.verdict)
    move = _new_move(history, "promotion", wanted, change, previous=champion)
    return _make(connection, name, move)


def restore_previous(
    connection: Connection, name: str, target: str, expected: str | None, change: Change
) -> Move:
    """Make `target`, the previous version, the champion again.

    The version in use before `target`, if known, becomes the previous one, so that a second
    rollback leads further back and never forward again.

    Raises:
        ChampionChangedError: the champion is not `expected`, or `target` not the previous version.
    """
    history = settle(connection, name)
    champion, previous = history.aliases.champion, history.aliases.previous
    if champion is None or champion != expected:
        raise _changed(name, "is not rolled back", champion, expected)
    if previous != target:
        raise _changed(
            name, f"is not rolled back to {target}", previous, target, "previous version"
        )
    wanted = require_version(connection, name, target)
    before = succession(history.moves)
    # a version may have been in use twice: what counts came before the last time
    last = len(before) - 1 - before[::-1].index(target) if target in before else 0
    earlier = before[:last]
    move = _new_move(history, "rollback", wanted, change, previous=earlier[-1] if earlier else None)
    return _make(connection, name, move)


def set_challenger(connection: Connection, name: str, version: str, verdict: str) -> bool:
    """Make `version` the challenger; False for the champion or a version that was rolled back."""
    history = settle(connection, name)
    wanted = require_version(connection, name, version)
    with connection.calls() as client:
        _set_verdict(client, name, version, verdict)
        if history.aliases.champion == version or ROLLED_BACK_TAG in wanted.tags:
            return False
        client.set_registered_model_alias(name, CHALLENGER, version)
    return True


def settle(connection: Connection, name: str) -> History:
    """Finish or undo a move that a crash left half made, and return the history."""
    try:
        with connection.calls() as client:
            tags = client.get_registered_model(name).tags
    except NotInMlflowError:
        return History(registered_model=name, aliases=Aliases())
    for move in from_tags(tags):
        if move.state == "begun":
            _settle(connection, name, move, read_history(connection, name).aliases)
    return read_history(connection, name)


def require_version(connection: Connection, name: str, version: str) -> Any:
    """Return MLflow's record of a version.

    Raises:
        RequestError: there is no such version.
    """
    try:
        with connection.calls() as client:
            return client.get_model_version(name, version)
    except NotInMlflowError:
        raise RequestError(
            f"There is no version {version} of {name}.",
            why="It was never registered, or was deleted.",
            next_command=command_for_history(name),
        ) from None


def command_for_history(name: str) -> str:
    """Return the command that shows the history of a registered model, whatever the settings."""
    return shell_line("qwen3ft", "history", "--set", f"name={name}")


def nothing_before(name: str, champion: str | None) -> RequestError:
    """Return the error for a rollback without a previous version."""
    return RequestError(
        f"There is no version of {name} to go back to; the champion is {champion or 'none'}.",
        why="No adapter was in use before it.",
        next_command=command_for_history(name),
    )


def _new_move(
    history: History,
    action: Literal["promotion", "rollback"],
    wanted: Any,
    change: Change,
    *,
    previous: str | None,
) -> Move:
    """Return the record of the move to `wanted`, MLflow's record of a version."""
    return Move(
        number=1 + max((move.number for move in history.moves), default=0),
        action=action,
        version=str(wanted.version),
        replaced=history.aliases.champion,
        run=wanted.tags.get(RUN_TAG),
        mlflow_run_id=wanted.run_id or None,
        previous=previous,
        previous_before=history.aliases.previous,
        by=change.by,
        verdict=change.verdict or wanted.tags.get(VERDICT_TAG, ""),
        reason=change.reason,
    )


def _make(connection: Connection, name: str, move: Move) -> Move:
    """Carry out a move; until the champion's alias moves, `settle` can undo it."""
    _record(connection, name, move)
    reach("move.begun")
    _set_previous(connection, name, move.previous)
    reach("move.prepared")
    with connection.calls() as client:
        if move.action == "rollback":
            client.set_model_version_tag(
                name, move.replaced, ROLLED_BACK_TAG, move.reason or "no reason given"
            )
        client.set_registered_model_alias(name, CHAMPION, move.version)
    reach("move.made")
    return _complete(connection, name, move)


def _complete(connection: Connection, name: str, move: Move) -> Move:
    """Clean up after the champion's alias has moved, and record the move as done."""
    with connection.calls() as client:
        challenger = client.get_registered_model(name).aliases.get(CHALLENGER)
        if str(challenger) == move.version:
            client.delete_registered_model_alias(name, CHALLENGER)
    if move.action == "promotion":  # by a person, if it was rolled back before
        _forget_rollback(connection, name, move.version)
    done = move.model_copy(update={"state": "done"})
    _record(connection, name, done)
    _describe(connection, name)
    return done


def _describe(connection: Connection, name: str) -> None:
    """Tell the history in the model's description, unless a person has written another one.

    The move is made by then, so trouble is only logged.
    """
    try:
        with connection.calls() as client:
            text = client.get_registered_model(name).description or ""
            if not text or text.startswith(ABOUT_ADAPTERS):
                history = read_history(connection, name)
                client.update_registered_model(name, describe_history(history))
    except (TrackingUnavailableError, RejectedError) as error:
        logger.warning("the description of %s is not up to date: %s", name, error)


def _settle(connection: Connection, name: str, move: Move, aliases: Aliases) -> None:
    """Finish a begun move whose version is in use; undo any other."""
    if aliases.champion == move.version:
        _complete(connection, name, move)
        return
    if aliases.champion == move.replaced:
        _set_previous(connection, name, move.previous_before)
    if move.action == "rollback" and move.replaced is not None:
        _forget_rollback(connection, name, move.replaced)
    with connection.calls() as client:
        for prefix in TAG_PREFIXES:
            client.delete_registered_model_tag(name, tag_name(move.number, prefix))


def _record(connection: Connection, name: str, move: Move) -> None:
    with connection.calls() as client:
        client.set_registered_model_tag(name, *to_tag(move))
        client.delete_registered_model_tag(name, tag_name(move.number, EARLIER_TAG_PREFIX))


def _set_verdict(client: Any, name: str, version: str, verdict: str) -> None:
    """Write the verdict as a tag, by which it is read, and as the text in the table of versions.

    A text that a person has written there stays.
    """
    before = client.get_model_version(name, version)
    client.set_model_version_tag(name, version, VERDICT_TAG, verdict)
    if (before.description or NO_VERDICT) in (NO_VERDICT, before.tags.get(VERDICT_TAG)):
        client.update_model_version(name, version, verdict)


def _set_previous(connection: Connection, name: str, version: str | None) -> None:
    with connection.calls() as client:
        if version is not None:
            client.set_registered_model_alias(name, PREVIOUS, version)
        elif PREVIOUS in client.get_registered_model(name).aliases:
            client.delete_registered_model_alias(name, PREVIOUS)


def _forget_rollback(connection: Connection, name: str, version: str) -> None:
    with connection.calls() as client:
        if ROLLED_BACK_TAG in client.get_model_version(name, version).tags:
            client.delete_model_version_tag(name, version, ROLLED_BACK_TAG)


def _refuse_rolled_back(connection: Connection, name: str, wanted: Any) -> None:
    """Raise if `wanted`, or a version of the very same bytes, was rolled back."""
    with connection.calls() as client:
        taken_back = [
            version
            for version in client.search_model_versions(f"name = '{name}'")
            if ROLLED_BACK_TAG in version.tags
            and (
                version.version == wanted.version
                or version.tags.get(DIGEST_TAG, "") == wanted.tags.get(DIGEST_TAG)
            )
        ]
    if taken_back:
        [same, *_] = taken_back
        raise RolledBackError(
            f"{name} {wanted.version} is not promoted: version {same.version}, the same adapter, "
            f"was rolled back ({same.tags[ROLLED_BACK_TAG]}).",
            why="An adapter that a person took out of use is only put back by a person.",
            next_command=shell_line("qwen3ft", "promote", wanted.version, "--set", f"name={name}"),
            version=str(wanted.version),
            rolled_back=str(same.version),
        )


def _changed(
    name: str, what: str, found: str | None, expected: str | None, alias: str = "champion"
) -> ChampionChangedError:
    return ChampionChangedError(
        f"{name} {what}: the {alias} is {found}, not {expected}.",
        why="Another run or person moved the alias meanwhile.",
        next_command=command_for_history(name),
        champion=found,
        expected=expected,
    )
