"""The command `settings`: what can be set, its default, its meaning, and what it trades."""

from __future__ import annotations

from typing import Annotated

import typer

from flows.cli.options import JsonOption
from flows.cli.output import open_console, print_json


def settings_command(
    word: Annotated[
        str | None, typer.Argument(metavar="WORD", help="Part of a name, or a word about it.")
    ] = None,
    markdown: Annotated[
        bool, typer.Option("--markdown", help="As the page docs/settings.md.")
    ] = False,
    as_json: JsonOption = False,
) -> None:
    """List the settings of a run: default, possible values, meaning, and what each trades."""
    from deployments.deploy import GPU_CONFIG, shipped_file
    from flows.cli.views.settings import settings_markdown, show_settings
    from qwen3ft.settings import describe_settings, find_settings

    found = describe_settings(shipped_file(GPU_CONFIG).read_text(encoding="utf-8"))
    if word is not None:
        found = find_settings(found, word)
    if as_json:
        print_json({"settings": [setting.model_dump() for setting in found]})
    elif markdown:
        typer.echo(settings_markdown(found), nl=False)
    else:
        show_settings(open_console(), found)
