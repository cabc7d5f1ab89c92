"""The commands about data: check (what a run would train on) and preview (one row by tokens)."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from flows.cli.options import ConfigOption, JsonOption, SetOption
from flows.cli.output import open_console, print_json, say

if TYPE_CHECKING:
    from qwen3ft.config import TrainingConfig
    from qwen3ft.data.pipeline import DataPipeline
    from qwen3ft.data.preview import ShownToken
    from qwen3ft.records.data import DatasetManifest

PREVIEWED_ROWS = 2

PathsArgument = Annotated[
    list[str] | None,
    typer.Argument(
        metavar="PATH...",
        help="Files, folders, globs or hub names; by default those of the settings.",
    ),
]


def check_command(
    paths: PathsArgument = None,
    config: ConfigOption = None,
    settings: SetOption = None,
    as_json: JsonOption = False,
) -> None:
    """Show what a run would train on; exit code 1 if it would not start."""
    _say_first(paths, config, quiet=as_json)
    from flows.cli.views.data import show_manifest, show_preview

    pipeline, manifest = _check(_data_config(paths, config, settings), quiet=as_json)
    if as_json:
        print_json({"would_start": True, **manifest.model_dump(mode="json")})
        return
    console = open_console()
    show_manifest(console, manifest)
    for number in range(1, min(PREVIEWED_ROWS, manifest.train.rows) + 1):
        show_preview(console, number, *_row_tokens(pipeline, manifest, number))


def preview_command(
    paths: PathsArgument = None,
    row: Annotated[int, typer.Option("--row", min=1, help="Training row, counted from 1.")] = 1,
    config: ConfigOption = None,
    settings: SetOption = None,
    as_json: JsonOption = False,
) -> None:
    """Show one training row token by token: what is given, and what is trained on."""
    _say_first(paths, config, quiet=as_json)
    from flows.cli.views.data import show_preview
    from qwen3ft.data.sources import command_to_check
    from qwen3ft.errors import DataLoadingError

    wanted = _data_config(paths, config, settings)
    pipeline, manifest = _check(wanted, quiet=as_json)
    if row > manifest.train.rows:
        again = f"{command_to_check(wanted, 'preview')} --row {manifest.train.rows}"
        raise DataLoadingError(
            f"There is no training row {row}: there are {manifest.train.rows}.",
            why="Rows are counted from 1, in the order of the files, without those left out.",
            next_command=again,
        )
    count, tokens = _row_tokens(pipeline, manifest, row)
    if as_json:
        shown = [{"text": token.text, "trained": token.trained} for token in tokens]
        print_json({"row": row, "tokens": count, "shown": shown})
    else:
        show_preview(open_console(), row, count, tokens)


def _say_first(paths: list[str] | None, config: Path | None, *, quiet: bool) -> None:
    """Say what is looked at, before imports that take seconds."""
    if not quiet:
        named = ", ".join(paths or ()) or f"the data of {config or 'the default settings'}"
        say(f"Looking at {named} ...")


def _data_config(
    paths: list[str] | None, config: Path | None, settings: list[str] | None
) -> TrainingConfig:
    from flows.cli.project import open_project, requested_settings
    from qwen3ft.config import parse_config
    from qwen3ft.data.sources import path_from

    here = Path.cwd()
    values, _ = requested_settings(open_project(anywhere=True).root, config, settings)
    if paths:  # relative to where they were typed, unlike those of a settings file
        values["data_paths"] = [path_from(here, path) for path in paths]
    return parse_config(values)


def _check(config: TrainingConfig, *, quiet: bool) -> tuple[DataPipeline, DatasetManifest]:
    from flows.cli.views.data import count_rows
    from qwen3ft import logs
    from qwen3ft.data.pipeline import DataPipeline

    logs.configure(console=False)
    pipeline = DataPipeline(config)
    with count_rows(open_console(stderr=True), quiet=quiet) as progress:
        return pipeline, pipeline.check(progress)


def _row_tokens(
    pipeline: DataPipeline, manifest: DatasetManifest, number: int
) -> tuple[int, list[ShownToken]]:
    """Return how many tokens a training row has, and its text by tokens."""
    from qwen3ft.data.preview import show_row
    from qwen3ft.data.token_table import load_split

    row = load_split(Path(manifest.path), "train")[number - 1]
    return len(row["input_ids"]), show_row(pipeline.tokenizer, row)
