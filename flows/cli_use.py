"""The commands that use what runs made: ask it, put it into use, take it back.

Names, options and help alone, as in `flows.cli`, which they are part of.
"""

from __future__ import annotations

from typing import Annotated

import typer

from flows.cli_options import ConfigOption, JsonOption, SetOption

use_app = typer.Typer()

AdapterOption = Annotated[
    str, typer.Option("--adapter", metavar="DIR", help="A saved adapter, or 'champion'.")
]

ReasonOption = Annotated[
    str, typer.Option("--reason", "-r", metavar="TEXT", help="Why; kept in the history.")
]


@use_app.command()
def generate(
    prompt: Annotated[str, typer.Argument(help="The question.")],
    adapter: AdapterOption = "champion",
    config: ConfigOption = None,
    settings: SetOption = None,
    as_json: JsonOption = False,
) -> None:
    """Answer one question with a fine-tuned model."""
    from flows import cli_adapter

    cli_adapter.generate(prompt, adapter, config, settings or [], as_json=as_json)


@use_app.command()
def chat(
    adapter: AdapterOption = "champion", config: ConfigOption = None, settings: SetOption = None
) -> None:
    """Ask a fine-tuned model question after question; each is answered on its own."""
    from flows import cli_adapter

    cli_adapter.chat(adapter, config, settings or [])


@use_app.command()
def promote(
    version: Annotated[str, typer.Argument(help="A version's number, or 'challenger'.")],
    reason: ReasonOption = "",
    allow_degraded: Annotated[
        bool, typer.Option("--allow-degraded", help="Although its run fell short of the plan.")
    ] = False,
    config: ConfigOption = None,
    settings: SetOption = None,
    as_json: JsonOption = False,
) -> None:
    """Put a registered version into use by hand, if its adapter is intact."""
    from flows import cli_history

    cli_history.promote(
        version, reason, config, settings or [], allow_degraded=allow_degraded, as_json=as_json
    )


@use_app.command()
def rollback(
    reason: ReasonOption,
    unverified: Annotated[
        bool, typer.Option("--unverified", help="Do not fetch and check the adapter first.")
    ] = False,
    config: ConfigOption = None,
    settings: SetOption = None,
    as_json: JsonOption = False,
) -> None:
    """Put the version into use again that was in use before; no run undoes it."""
    from flows import cli_history

    cli_history.rollback(reason, config, settings or [], verify=not unverified, as_json=as_json)


@use_app.command()
def history(
    config: ConfigOption = None, settings: SetOption = None, as_json: JsonOption = False
) -> None:
    """Show what is in use, and every promotion and rollback: when, what, whose run, who, why."""
    from flows import cli_history

    cli_history.history(config, settings or [], as_json=as_json)
