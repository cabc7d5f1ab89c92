"""Options that several commands share, and what is typed after `--set`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from flows.cli.output import say

ConfigOption = Annotated[
    Path | None,
    typer.Option("--config", "-c", metavar="FILE", help="Settings file (YAML).", resolve_path=True),
]
SetOption = Annotated[
    list[str] | None,
    typer.Option("--set", "-s", metavar="KEY=VALUE", help="Change one setting; may be repeated."),
]
JsonOption = Annotated[bool, typer.Option("--json", help="Print one JSON object.")]
ResumeOption = Annotated[
    str | None, typer.Option("--resume", metavar="RUN_ID", help="Continue an earlier run.")
]
AdapterOption = Annotated[
    str,
    typer.Option(
        "--adapter",
        metavar="WHICH",
        help="champion, challenger, previous, a version, a run id, or a folder.",
    ),
]
ThinkOption = Annotated[
    bool | None,
    typer.Option("--think/--no-think", help="Think first; by default as in the adapter's run."),
]


def read_overrides(settings: list[str] | None) -> dict[str, Any]:
    """Return the values of `--set`, not yet validated, under the current names of the settings.

    Raises:
        typer.BadParameter: one of them is not KEY=VALUE.
        ConfigError: a value is empty or not closed, or a setting is given twice.
    """
    from qwen3ft.config import with_current_names
    from qwen3ft.errors import ConfigError
    from qwen3ft.settings import is_read_otherwise, read_setting
    from qwen3ft.text.yaml import UnreadableYamlError

    values: dict[str, Any] = {}
    for setting in settings or ():
        name, equals, text = (part.strip() for part in setting.partition("="))
        if not equals or not name:
            raise typer.BadParameter(f"{setting!r} is not KEY=VALUE", param_hint="--set")
        try:
            if name in values:
                raise UnreadableYamlError("it is given twice")
            values[name] = read_setting(name, text)
        except UnreadableYamlError as error:
            raise ConfigError(
                f"Cannot read the value of --set {name[:100]}=: {error}.",
                why="A value is a number, a text, true, false, null, or a [list] with brackets.",
                next_command="qwen3ft settings",
            ) from error
        if is_read_otherwise(name, text):
            say(f"{name} is the text {values[name]!r}")
    return with_current_names(values)
