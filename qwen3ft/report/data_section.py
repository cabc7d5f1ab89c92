"""The data of a run and the new part of it: as a section of the card and as a page of its own."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import get_args

from qwen3ft.data.safety import safe_excerpt
from qwen3ft.records.data import DataChange, DatasetManifest
from qwen3ft.records.run_card import DataSection, FileLine, FileState
from qwen3ft.report.safe_text import EXAMPLE_CHARACTERS, escape_markdown, markdown_table

MOST_FILES = 40
"""Most files that are listed; a folder may hold thousands."""
_MOST_NAMES = 20

_ORDER = get_args(FileState)


def data_section(manifest: DatasetManifest, change: DataChange) -> DataSection:
    """Return the data section of the card."""
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
        again=change.again,
        files=tuple(_files(manifest, change)),
        examples=tuple(safe_excerpt(text, EXAMPLE_CHARACTERS) for text in change.examples),
        warnings=manifest.warnings,
    )


def _files(manifest: DatasetManifest, change: DataChange) -> Iterator[FileLine]:
    """Yield every file, new and changed ones first."""
    states: dict[str, FileState] = dict.fromkeys(change.changed_files, "changed")
    states |= dict.fromkeys(change.new_files, "new")
    found = [
        FileLine(
            path=source.path,
            role=source.role,
            rows=source.rows,
            new_rows=change.new_rows_by_file.get(source.path, 0),
            state=states.get(source.path, "unchanged"),
            notes=source.notes,
        )
        for source in manifest.sources
    ]
    found += [FileLine(path=path, role="", rows=0, state="gone") for path in change.gone_files]
    yield from sorted(found, key=lambda file: (_ORDER.index(file.state), -file.new_rows, file.path))


def data_markdown(manifest: DatasetManifest, change: DataChange) -> str:
    """Render the page on the data, for Prefect's artifacts and MLflow."""
    section = data_section(manifest, change)
    sums = " + ".join(f"{count:,} {name}" for name, count in section.went.items())
    layouts = ", ".join(f"{name} ({rows:,})" for name, rows in manifest.layouts.items())
    columns = ", ".join(f"{part} = `{name}`" for part, name in manifest.columns.items())
    splits = [
        (
            name,
            f"{split.tokens:,}",
            f"{split.trained_tokens:,}",
            str(split.median_tokens),
            str(split.p95_tokens),
            str(split.longest_tokens),
        )
        for name, split in (("train", manifest.train), ("dev", manifest.dev))
    ]
    lines = [
        "# Data",
        "",
        f"**{manifest.rows_read:,} rows read** = {sums}",
        "",
        f"Layout: {layouts}; {columns}.",
        "",
        *_counted_markdown("Not used", manifest.unused),
        *(f"- not read: {escape_markdown(line)}" for line in manifest.skipped[:MOST_FILES]),
        "",
        *_counted_markdown("Changed while reading", manifest.changed),
        *new_rows_markdown(section),
        *(f"> {escape_markdown(warning)}\n" for warning in manifest.warnings),
        "",
        *files_markdown(section),
        "",
        *markdown_table(("split", "tokens", "trained", "median", "95 %", "longest"), splits),
    ]
    if manifest.reasons:
        reasons = [(reason, f"{rows:,}") for reason, rows in manifest.reasons.items()]
        lines += ["", *markdown_table(("reason for leaving out", "rows"), reasons)]
    return "\n".join(lines) + "\n"


def _counted_markdown(title: str, rows_by_name: Mapping[str, int]) -> list[str]:
    named = [f"{escape_markdown(name)} ({rows:,})" for name, rows in rows_by_name.items()]
    more = f" and {len(named) - _MOST_NAMES:,} more" if len(named) > _MOST_NAMES else ""
    return [f"{title}: {', '.join(named[:_MOST_NAMES])}{more}.", ""] if named else []


def new_rows_sentence(section: DataSection) -> str:
    """Return the number of new rows, and since when they are counted."""
    if section.since is None:
        return f"Nothing was in use before: all {section.new_rows:,} training rows are new."
    again = f" It is trained on again, {section.again}." if section.again else ""
    return f"{section.new_rows:,} training rows are new since {section.since}.{again}"


def new_rows_markdown(section: DataSection) -> list[str]:
    """Render the sentence, and the questions of a few new rows."""
    lines = [escape_markdown(new_rows_sentence(section)), ""]
    if section.examples:
        examples = (f"- {escape_markdown(text)}" for text in section.examples)
        lines += ["Questions of some new rows:", "", *examples, ""]
    return lines


def files_markdown(section: DataSection) -> list[str]:
    """Render the table of files; their states only if there is something to compare with."""
    files = section.files
    rows = [
        (
            escape_markdown("; ".join((file.path, *file.notes))),
            file.role,
            f"{file.rows:,}",
            f"{file.new_rows:,}",
            file.state if section.since else "",
        )
        for file in files[:MOST_FILES]
    ]
    if len(files) > MOST_FILES:
        rows.append((f"and {len(files) - MOST_FILES:,} more", "", "", "", ""))
    right = ("rows read", "new rows")
    return markdown_table(("file", "role", *right, ""), rows, right=right)
