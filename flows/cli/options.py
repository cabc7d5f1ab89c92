"""Options that several commands share, and what is typed after `--set`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

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
    """Return the values of `--set`, read as YAML, under the current names of the settings.

    Raises:
        typer.BadParameter: one of them is not KEY=VALUE.
        ConfigError: a value is not YAML, or more than a setting may be.
    """
    from qwen3ft.config import TrainingConfig, with_current_names
    from qwen3ft.errors import ConfigError
    from qwen3ft.yaml_text import UnreadableYamlError, load_yaml

    values: dict[str, Any] = {}
    for setting in settings or ():
        name, equals, text = setting.partition("=")
        if not equals:
            raise typer.BadParameter(f"{setting!r} is not KEY=VALUE", param_hint="--set")
        try:
            value = load_yaml(text)
        except UnreadableYamlError as error:
            raise ConfigError(
                f"Cannot read the value of --set {name[:100]}=: {error}",
                why="A value is YAML: a number, a text, true, false, null or a [list].",
                next_command="qwen3ft plan --help",
            ) from error
        field = TrainingConfig.model_fields.get(name)
        if field is not None and isinstance(value, bool) and not isinstance(field.default, bool):
            value = text.strip()  # YAML reads packing=on as true
        if field is not None and isinstance(field.default, tuple) and isinstance(value, str):
            value = value.split(",")  # --set data_paths=a.jsonl,b.jsonl
        values[name] = value
    return with_current_names(values)
