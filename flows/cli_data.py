"""The commands about data: check (what a run would train on) and preview (one row by tokens)."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from rich.progress import Progress, ProgressColumn, SpinnerColumn, Task, TextColumn
from rich.text import Text

from flows.cli_project import open_project, read_request
from flows.cli_view import open_console, print_json, say
from flows.data_view import show_manifest, show_preview
from qwen3ft import logs
from qwen3ft.config import TrainingConfig, parse_config
from qwen3ft.errors import DataLoadingError

if TYPE_CHECKING:
    from collections.abc import Callable

    from qwen3ft.data.pipeline import DataPipeline
    from qwen3ft.records.data import DatasetManifest

PREVIEWED_ROWS = 2


def check(paths: list[str], config: Path | None, settings: list[str], *, as_json: bool) -> None:
    """Read the files and say what a run would train on; an error if none would start."""
    pipeline, manifest = _checked(paths, config, settings, quiet=as_json)
    if as_json:
        print_json({"would_start": True, **manifest.model_dump(mode="json")})
        return
    console = open_console()
    show_manifest(console, manifest)
    for number in range(1, min(PREVIEWED_ROWS, manifest.train.rows) + 1):
        _preview(pipeline, manifest, number)


def preview(
    paths: list[str], number: int, config: Path | None, settings: list[str], *, as_json: bool
) -> None:
    """One training row, token by token."""
    pipeline, manifest = _checked(paths, config, settings, quiet=as_json)
    if number > manifest.train.rows:
        raise DataLoadingError(
            f"There is no training row {number}: there are {manifest.train.rows}.",
            why="Rows are counted from 1, in the order of the files, without those left out.",
            next_command=f"qwen3ft data preview --row {manifest.train.rows}",
        )
    _preview(pipeline, manifest, number, as_json=as_json)


def _checked(
    paths: list[str], path: Path | None, settings: list[str], *, quiet: bool
) -> tuple[DataPipeline, DatasetManifest]:
    from qwen3ft.data.pipeline import DataPipeline

    config = _config(paths, path, settings)
    logs.configure(console=False)
    pipeline = DataPipeline(config)
    with _progress(quiet=quiet) as progress:
        return pipeline, pipeline.check(progress)


def _config(paths: list[str], path: Path | None, settings: list[str]) -> TrainingConfig:
    here = Path.cwd()
    values, notice = read_request(open_project().root, path, settings)
    if notice:
        say(notice)
    if paths:  # as typed: relative to where they were typed, unlike those of a config
        values["data_paths"] = [str(here / p) if (here / p).exists() else p for p in paths]
    return parse_config(values)


class _RateColumn(ProgressColumn):
    """Rows per second of late."""

    def render(self, task: Task) -> Text:
        """Nothing until there is a rate."""
        return Text(f"{task.speed:,.0f} rows/s" if task.speed else "")


@contextmanager
def _progress(*, quiet: bool) -> Iterator[Callable[[int], None]]:
    """A line that counts rows while they are read, on a terminal."""
    columns = (SpinnerColumn(), TextColumn("{task.completed:,} rows"), _RateColumn())
    with Progress(
        *columns, console=open_console(stderr=True), transient=True, disable=quiet
    ) as bar:
        task = bar.add_task("rows", total=None)
        yield lambda rows: bar.update(task, completed=rows)


def _preview(
    pipeline: DataPipeline, manifest: DatasetManifest, number: int, *, as_json: bool = False
) -> None:
    from qwen3ft.data.preview import show_row
    from qwen3ft.data.token_table import load_split

    row = load_split(Path(manifest.path), "train")[number - 1]
    tokens = show_row(pipeline.tokenizer, row)
    if as_json:
        shown = [{"text": token.text, "trained": token.trained} for token in tokens]
        print_json({"row": number, "tokens": len(row["input_ids"]), "shown": shown})
    else:
        show_preview(open_console(), number, len(row["input_ids"]), tokens)
