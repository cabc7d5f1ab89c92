"""The commands about what is in use: promote, rollback and history."""

from __future__ import annotations

from pathlib import Path

from flows.cli_project import open_project, request_config, use_local_services
from flows.cli_view import open_console, print_json, say
from qwen3ft.errors import RequestError
from qwen3ft.registry.lookup import version_name
from qwen3ft.registry.moves import Change, History, Move, this_person
from qwen3ft.registry.registry import Registry
from qwen3ft.tracking.connection import default_tracking_uri


def promote(
    wanted: str,
    reason: str,
    path: Path | None,
    settings: list[str],
    *,
    allow_degraded: bool,
    as_json: bool,
) -> None:
    """Put a version into use by hand, after its adapter was fetched and found intact."""
    registry, name = _open(path, settings)
    champion = registry.champion(name)  # before the fetch, which may take minutes
    number = version_name(wanted)
    version = registry.version(name, number) if number else None
    if version is None:
        raise _no_such_version(name, wanted)
    degraded = registry.check(version)
    if degraded and not allow_degraded:
        raise RequestError(
            f"{name} {version.version} is degraded: {'; '.join(degraded)}.",
            why="Its run fell short of what was asked for, so its scores are not the plan's.",
            next_command=f"qwen3ft promote {version.version} --allow-degraded",
            degraded=list(degraded),
        )
    before = champion.version if champion else None
    change = Change(by=this_person(), reason=reason)
    move = registry.promote(name, version.version, before, change)
    _show_move(name, move, f"{name} {version.version} is the champion already.", as_json=as_json)


def rollback(
    reason: str, path: Path | None, settings: list[str], *, verify: bool, as_json: bool
) -> None:
    """Put the previous version into use again."""
    registry, name = _open(path, settings)
    move = registry.rollback(name, Change(by=this_person(), reason=reason), verify=verify)
    _show_move(name, move, "", as_json=as_json)


def history(path: Path | None, settings: list[str], *, as_json: bool) -> None:
    """Show every promotion and rollback."""
    registry, name = _open(path, settings)
    found = registry.history(name)
    if as_json:
        print_json(found.model_dump(mode="json"))
    else:
        _show_history(found)


def _open(path: Path | None, settings: list[str]) -> tuple[Registry, str]:
    """The registry, and the name of the model that the settings are about."""
    stack = open_project()
    config = request_config(stack.root, path, settings)
    use_local_services(stack)
    name = config.registered_name
    return Registry(default_tracking_uri()), name


def _no_such_version(name: str, wanted: str) -> RequestError:
    return RequestError(
        f"There is no version {wanted!r} of {name}.",
        why="A number, or champion, challenger or previous is asked for.",
        next_command="qwen3ft history",
    )


def _show_move(name: str, move: Move | None, otherwise: str, *, as_json: bool) -> None:
    if as_json:
        shown = move.model_dump(mode="json") if move else None
        print_json({"registered_model": name, "move": shown})
        return
    if move is None:
        say(otherwise)
        return
    instead = f"instead of {move.replaced}" if move.replaced else "where none was in use"
    of_run = f" (run {move.run})" if move.run else ""
    say(f"{name} {move.version}{of_run} is the champion now, {instead}.")
    if move.action == "promotion" and move.previous:
        say('Back: qwen3ft rollback --reason "..."')


def _show_history(found: History) -> None:
    """The names, then one line a move, the newest first."""
    console = open_console()
    names = found.aliases.model_dump()
    told = ", ".join(f"{name} {version}" for name, version in names.items() if version)
    console.print(f"{found.registered_model}: {told or 'nothing is in use'}", soft_wrap=True)
    for move in reversed(found.moves):
        when = f"{move.at.astimezone():%Y-%m-%d %H:%M:%S}"
        versions = f"{move.replaced or '-'} -> {move.version}"
        verdict = move.verdict if move.action == "promotion" else ""
        why = "; ".join(part for part in (move.reason, verdict) if part)
        line = f"  {when}  {move.action:9}  {versions:9}  of run {move.run or '?'}, by {move.by}"
        console.print(f"{line}: {why}" if why else line, soft_wrap=True, markup=False)
