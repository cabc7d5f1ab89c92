"""The commands about the version in use: promote, rollback and history."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from flows.cli.options import ConfigOption, JsonOption, SetOption
from flows.cli.output import open_console, print_json, say
from qwen3ft.text.commands import runnable

if TYPE_CHECKING:
    from qwen3ft.errors import RequestError
    from qwen3ft.registry.moves import Move
    from qwen3ft.registry.registry import Registry

ReasonOption = Annotated[
    str, typer.Option("--reason", "-r", metavar="TEXT", help="Why; kept in the history.")
]


def promote_command(
    version: Annotated[str, typer.Argument(help="A version number, or 'challenger'.")],
    reason: ReasonOption = "",
    allow_degraded: Annotated[
        bool, typer.Option("--allow-degraded", help="Even if its run fell short of the plan.")
    ] = False,
    config: ConfigOption = None,
    settings: SetOption = None,
    as_json: JsonOption = False,
) -> None:
    """Put a registered version into use by hand, if its adapter is intact."""
    from qwen3ft.errors import RequestError
    from qwen3ft.registry.lookup import version_name
    from qwen3ft.registry.moves import Change, this_person
    from qwen3ft.text.commands import shell_line

    registry, model = _open_registry(config, settings)
    champion = registry.champion(model)  # before the fetch, which may take minutes
    number = version_name(version)
    found = registry.version(model, number) if number else None
    if found is None:
        raise _no_such_version(model, version)
    degraded = registry.check(found)
    if degraded and not allow_degraded:
        raise RequestError(
            f"{model} {found.version} is degraded: {'; '.join(degraded)}.",
            why="Its run fell short of what was asked for, so its scores are not the plan's.",
            next_command=shell_line(
                *(
                    "qwen3ft",
                    "promote",
                    found.version,
                    "--allow-degraded",
                    "--set",
                    f"name={model}",
                ),
                *(("--reason", reason) if reason else ()),
            ),
            degraded=list(degraded),
        )
    before = champion.version if champion else None
    change = Change(by=this_person(), reason=reason)
    move = registry.promote(model, found.version, before, change)
    if move is None and not as_json:
        say(f"{model} {found.version} is already the champion.")
    else:
        _show_move(model, move, as_json=as_json)


def rollback_command(
    reason: ReasonOption,
    unverified: Annotated[
        bool, typer.Option("--unverified", help="Do not fetch and check the adapter first.")
    ] = False,
    config: ConfigOption = None,
    settings: SetOption = None,
    as_json: JsonOption = False,
) -> None:
    """Put the previous version back into use; no later run undoes it."""
    from qwen3ft.registry.moves import Change, this_person

    registry, model = _open_registry(config, settings)
    change = Change(by=this_person(), reason=reason)
    _show_move(model, registry.rollback(model, change, verify=not unverified), as_json=as_json)


def history_command(
    config: ConfigOption = None, settings: SetOption = None, as_json: JsonOption = False
) -> None:
    """Show what is in use, and every promotion and rollback: when, what, which run, who, why."""
    registry, model = _open_registry(config, settings)
    found = registry.history(model)
    if as_json:
        print_json(found.model_dump(mode="json"))
    else:
        from flows.cli.views.common import show_history

        show_history(open_console(), found)


def _open_registry(config: Path | None, settings: list[str] | None) -> tuple[Registry, str]:
    """Return the registry, and the name of the registered model that the settings are about."""
    from flows.cli.project import open_project, request_config, use_local_services
    from qwen3ft.registry.registry import Registry
    from qwen3ft.registry.task_name import with_task_name
    from qwen3ft.tracking.uri import default_tracking_uri

    stack = open_project()
    wanted = request_config(stack.root, config, settings)
    use_local_services(stack)
    registry = Registry(default_tracking_uri())
    return registry, with_task_name(wanted, registry).registered_name


def _no_such_version(model: str, wanted: str) -> RequestError:
    from qwen3ft.errors import RequestError
    from qwen3ft.registry.aliases import command_for_history

    return RequestError(
        f"There is no version {wanted!r} of {model}.",
        why="It must be a version number, champion, challenger or previous.",
        next_command=command_for_history(model),
    )


def _show_move(model: str, move: Move | None, *, as_json: bool) -> None:
    if as_json:
        shown = move.model_dump(mode="json") if move else None
        print_json({"registered_model": model, "move": shown})
    elif move is not None:
        instead = f"instead of {move.replaced}" if move.replaced else "where none was in use"
        of_run = f" (run {move.run})" if move.run else ""
        say(f"{model} {move.version}{of_run} is the champion now, {instead}.")
        if move.action == "promotion" and move.previous:
            say(f'To go back: {runnable("qwen3ft rollback")} --reason "..."')
