"""What a run was trained on and what of it is new: for its card, and as a page of its own.

Guarantees: pure functions of records; texts of users are shown as `qwen3ft.report.safe_text`
allows.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from qwen3ft.data.safety import shown
from qwen3ft.records.data import DataChange, DatasetManifest
from qwen3ft.records.run_card import DataSection, FileLine
from qwen3ft.report.safe_text import EXAMPLE_CHARACTERS, escape_markdown

MOST_FILES = 40
"""Listed one by one, the new and changed ones first; a folder may hold thousands."""

_ORDER = ("new", "changed", "gone", "unchanged")


def data_section(manifest: DatasetManifest, change: DataChange) -> DataSection:
    """The data's part of the card."""
    return DataSection(
        digest=manifest.digest,
        rows_read=manifest.rows_read,
        went={
            "trained on": manifest.train.rows,
            "held out for stopping": manifest.dev.rows,
            "for the test": manifest.test_rows,
            "quarantined": manifest.quarantined,
            "too long": manifest.too_long,
            "duplicates": manifest.duplicates,
            "not used": manifest.not_used,
        },
        train_tokens=manifest.train.tokens,
        since=change.since,
        new_rows=change.new_rows,
        files=tuple(_files(manifest, change)),
        examples=tuple(shown(text, EXAMPLE_CHARACTERS) for text in change.examples),
        warnings=manifest.warnings,
    )


def _files(manifest: DatasetManifest, change: DataChange) -> Iterator[FileLine]:
    """Every file, new ones first; none is new where there is nothing to compare with."""
    found = [
        FileLine(
            path=source.path,
            role=source.role,
            rows=source.rows,
            new_rows=change.new_rows_by_file.get(source.path, 0),
            state="new"
            if source.path in change.new_files
            else "changed"
            if source.path in change.changed_files
            else "unchanged",
        )
        for source in manifest.sources
    ]
    found += [FileLine(path=path, role="", rows=0, state="gone") for path in change.gone_files]
    yield from sorted(found, key=lambda file: (_ORDER.index(file.state), -file.new_rows, file.path))


def data_markdown(manifest: DatasetManifest, change: DataChange) -> str:
    """What was read, trained on and new in it, for Prefect's artifact page and MLflow."""
    story = data_section(manifest, change)
    sums = " + ".join(f"{count:,} {name}" for name, count in story.went.items())
    layouts = ", ".join(f"{name} ({rows:,})" for name, rows in manifest.layouts.items())
    columns = ", ".join(f"{part} = `{name}`" for part, name in manifest.columns.items())
    lines = [
        "# Data",
        "",
        f"**{manifest.rows_read:,} rows read** = {sums}",
        "",
        f"Layout: {layouts}; {columns}.",
        "",
        *new_rows_markdown(story),
        *(f"> {escape_markdown(warning)}\n" for warning in manifest.warnings),
        "",
        *files_markdown(story.files, story.since),
        "",
        "| split | tokens | trained | median | 95 % | longest |",
        "|---|---|---|---|---|---|",
    ]
    lines += [
        f"| {name} | {split.tokens:,} | {split.trained_tokens:,} | {split.median_tokens} "
        f"| {split.p95_tokens} | {split.longest_tokens} |"
        for name, split in (("train", manifest.train), ("dev", manifest.dev))
    ]
    if manifest.reasons:
        lines += ["", "| left out because | rows |", "|---|---|"]
        lines += [f"| {reason} | {rows:,} |" for reason, rows in manifest.reasons.items()]
    return "\n".join(lines) + "\n"


def new_rows_sentence(story: DataSection) -> str:
    """How many rows are new, and since when."""
    if story.since is None:
        return f"Nothing was in use before: all {story.new_rows:,} rows for training are new."
    return f"Since {story.since}: {story.new_rows:,} rows that it has not seen."


def new_rows_markdown(story: DataSection) -> list[str]:
    """The sentence, and what a few of the new rows ask."""
    lines = [escape_markdown(new_rows_sentence(story)), ""]
    if story.examples:
        lines += [
            "Some of them ask:",
            "",
            *(f"- {escape_markdown(text)}" for text in story.examples),
        ]
        lines.append("")
    return lines


def files_markdown(files: Sequence[FileLine], since: str | None) -> list[str]:
    """A table of the files; `new_rows` and states only where something was compared."""
    lines = ["| file | for | rows read | new rows | |", "|---|---|---:|---:|---|"]
    lines += [
        f"| {escape_markdown(file.path)} | {file.role} | {file.rows:,} | {file.new_rows:,} "
        f"| {file.state if since else ''} |"
        for file in files[:MOST_FILES]
    ]
    if len(files) > MOST_FILES:
        lines.append(f"| and {len(files) - MOST_FILES:,} more | | | | |")
    return lines
