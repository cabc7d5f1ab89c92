"""Data on a terminal: the one screen of `qwen3ft data check`, and rows token by token."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from rich.console import Console
from rich.progress import Progress, ProgressColumn, SpinnerColumn, Task, TextColumn
from rich.text import Text

from flows.cli.views.common import show_sections

if TYPE_CHECKING:
    from qwen3ft.data.preview import ShownToken
    from qwen3ft.records.data import DatasetManifest

_BAR_CHARACTERS = 40
_SHOWN_FILES, _SHOWN_NAMES = 8, 20
_GIVEN, _TRAINED = ("grey50", "grey62"), ("green", "bold green")
"""Two alternating shades each, so that token boundaries can be seen."""


class _RateColumn(ProgressColumn):
    """Rows per second over the last moments; empty until there is a rate."""

    def render(self, task: Task) -> Text:
        """Render the rate of a task."""
        return Text(f"{task.speed:,.0f} rows/s" if task.speed else "")


@contextmanager
def count_rows(console: Console, *, quiet: bool) -> Iterator[Callable[[int], None]]:
    """Show a line that counts rows while they are read; yield what updates it."""
    columns = (SpinnerColumn(), TextColumn("{task.completed:,} rows"), _RateColumn())
    # Without a thread of its own: a process of several threads has no helpers (`jobs.helpers`).
    with Progress(
        *columns, console=console, transient=True, disable=quiet, auto_refresh=False
    ) as bar:
        task = bar.add_task("rows", total=None)
        yield lambda rows: bar.update(task, completed=rows, refresh=True)


def show_manifest(console: Console, manifest: DatasetManifest) -> None:
    """Print files, how they were understood, where the rows went, lengths, and warnings."""
    show_sections(
        console,
        "Data",
        {
            "Files": _files(manifest),
            "Understood as": _understood(manifest),
            "Rows": _rows(manifest),
            "Tokens": _tokens(manifest),
            "Lengths in tokens": _lengths(manifest),
            **({"Warnings": _numbered(manifest.warnings)} if manifest.warnings else {}),
        },
    )


def show_preview(console: Console, number: int, token_count: int, tokens: list[ShownToken]) -> None:
    """Print a row by tokens: trained ones are green, or between » and « without a terminal."""
    marked = "in green" if console.is_terminal else "between » and «"
    console.print(f"Training row {number}, {token_count} tokens (trained ones {marked}):")
    text = Text()
    if console.is_terminal:
        for index, token in enumerate(tokens):
            text.append(token.text, style=(_TRAINED if token.trained else _GIVEN)[index % 2])
    else:
        for index, token in enumerate(tokens):
            before = tokens[index - 1].trained if index else False
            after = tokens[index + 1].trained if index + 1 < len(tokens) else False
            start = "»" if token.trained and not before else ""
            end = "«" if token.trained and not after else ""
            text.append(f"{start}{token.text}{end}")
    console.print(text, soft_wrap=True)


def _files(manifest: DatasetManifest) -> dict[str, str]:
    shown = {
        source.path: "; ".join((f"{source.rows:,} rows for {source.role}", *source.notes))
        for source in manifest.sources[:_SHOWN_FILES]
    }
    if more := len(manifest.sources) - _SHOWN_FILES:
        shown |= {"...": f"and {more:,} more files"} if more > 0 else {}
    skipped = (line.partition(": ") for line in manifest.skipped[:_SHOWN_FILES])
    shown |= {path: f"not read: {why}" for path, _, why in skipped}
    if (more := len(manifest.skipped) - _SHOWN_FILES) > 0:
        shown |= {"... not read": f"and {more:,} more files"}
    return shown


def _understood(manifest: DatasetManifest) -> dict[str, str]:
    share = 100 / max(manifest.usable_rows, 1)
    return {
        "layout": ", ".join(f"{name} ({rows:,})" for name, rows in manifest.layouts.items()),
        "columns": ", ".join(f"{part} = {name}" for part, name in manifest.columns.items()),
        **{f"and in {rows:,} rows": columns for columns, rows in manifest.other_columns.items()},
        **({"not used": _counted(manifest.unused)} if manifest.unused else {}),
        **({"changed": _counted(manifest.changed)} if manifest.changed else {}),
        "language": f"{share * manifest.chinese_rows:.0f} % of questions with Chinese",
        "reasoning": f"{share * manifest.reasoning_rows:.0f} % of rows",
        "conversations": f"{manifest.conversations:,} of several turns, or with tools or system",
    }


def _counted(rows_by_name: dict[str, int]) -> str:
    shown = [f"{name} ({rows:,})" for name, rows in rows_by_name.items()]
    more = len(shown) - _SHOWN_NAMES
    return ", ".join([*shown[:_SHOWN_NAMES], *([f"and {more:,} more"] if more > 0 else [])])


def _rows(manifest: DatasetManifest) -> dict[str, str]:
    counts = {
        "read": manifest.rows_read,
        "= train": manifest.train.rows,
        "+ dev": manifest.dev.rows,
        "+ test": manifest.test_rows,
        "+ quarantined": manifest.quarantined,
        "+ too long": manifest.too_long,
        "+ duplicates": manifest.duplicates,
        "+ not used": manifest.not_used,
    }
    shown = {name: f"{count:>9,}" for name, count in counts.items()}
    shown |= {f"  {reason}": f"{count:>9,}" for reason, count in manifest.reasons.items()}
    if manifest.near_duplicates:
        shown["near-duplicates"] = f"{manifest.near_duplicates:>9,} in train"
    shown |= {f"  {kind}": f"{rows:>9,} rows" for kind, rows in manifest.personal_data.items()}
    return shown


def _tokens(manifest: DatasetManifest) -> dict[str, str]:
    return {
        name: f"{split.tokens:,} tokens, {split.trained_tokens:,} of them trained; median "
        f"{split.median_tokens}, 95 % up to {split.p95_tokens}, longest {split.longest_tokens}"
        for name, split in (("train", manifest.train), ("dev", manifest.dev))
    }


def _lengths(manifest: DatasetManifest) -> dict[str, str]:
    most = max((rows for _, rows in manifest.length_histogram), default=1)
    limit, below = manifest.max_sequence_length, 0
    shown: dict[str, str] = {}
    for edge, rows in manifest.length_histogram:
        if below < limit <= edge and manifest.too_long:
            shown["limit"] = f"max_sequence_length {limit}: {manifest.too_long:,} rows are longer"
        if rows:
            shown[f"up to {edge}"] = "█" * -(-_BAR_CHARACTERS * rows // most) + f" {rows:,}"
        below = edge
    shown |= {
        f"longest {number}": (
            f"{'at least ' * row.at_least}{row.tokens} tokens  {row.file}:{row.line}"
        )
        for number, row in enumerate(manifest.longest[:3], 1)
    }
    return shown


def _numbered(lines: tuple[str, ...]) -> dict[str, str]:
    return {str(number): line for number, line in enumerate(lines, 1)}
