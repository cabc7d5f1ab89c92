"""All input files read: the usable rows, a quarantine file for the bad ones, a circuit breaker.

Guarantees: every row read is in `rows` or is one line of the quarantine file; a file that changed
while it was read, no rows at all, or a larger share of bad ones than the config allows ends the
stage with the numbers. Rows are kept in memory: their text and about 1 kB each.
A file that cannot be read as a whole is one line (line 0) of the quarantine and one `unreadable`;
the rows it gave before it broke off count as rows, it does not.
It imports neither torch nor transformers.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TextIO

from qwen3ft.config import TrainingConfig
from qwen3ft.errors import DataLoadingError
from qwen3ft.logs import get_logger
from qwen3ft.records import DataSource
from qwen3ft.rows import UNREADABLE_FILE, BadRow, Columns, Fields, QaRow, read_file
from qwen3ft.sources import SourceFile, digest_of

logger = get_logger("data")

HAN = re.compile("[\u4e00-\u9fff]")
"""CJK unified ideographs: what makes a row count as Chinese."""


@dataclass
class Reading:
    """What the files held."""

    rows: list[QaRow] = field(default_factory=list)
    sources: list[DataSource] = field(default_factory=list)
    bad: Counter[str] = field(default_factory=Counter)
    """Bad rows by reason code."""
    unreadable: int = 0
    """Files that could not be read, or not to their end."""
    columns: Counter[Columns] = field(default_factory=Counter)

    @property
    def rows_read(self) -> int:
        """Good and bad rows of all files."""
        return len(self.rows) + self.bad.total()


def read_sources(files: Sequence[SourceFile], config: TrainingConfig, quarantine: Path) -> Reading:
    """Read every file; bad rows go to the file `quarantine`, which is replaced.

    Raises:
        DataLoadingError: no usable row, too many bad ones, or a file changed under the reader.
    """
    fields = Fields(config.question_field, config.answer_field, config.reasoning_separator)
    reading = Reading()
    quarantine.parent.mkdir(parents=True, exist_ok=True)
    with quarantine.open("w", encoding="utf-8") as stream:
        for file in files:
            reading.sources.append(_read_source(file, fields, reading, stream))
    _report(reading)
    _check(reading, config.max_bad_fraction, quarantine)
    return reading


def _read_source(
    file: SourceFile, fields: Fields, reading: Reading, quarantine: TextIO
) -> DataSource:
    """Add one file's rows to `reading`."""
    before, digest, rows_before = file.path.stat(), digest_of(file), reading.rows_read
    for row in read_file(file, fields, reading.columns):
        if isinstance(row, BadRow):
            quarantine.write(json.dumps(asdict(row), ensure_ascii=False) + "\n")
            if row.reason == UNREADABLE_FILE:
                reading.unreadable += 1
                logger.warning("%s cannot be read: %s", file.label, row.excerpt)
            else:
                reading.bad[row.reason] += 1
        else:
            reading.rows.append(row)
    after = file.path.stat()
    if (before.st_size, before.st_mtime_ns) != (after.st_size, after.st_mtime_ns):
        raise DataLoadingError(
            f"{file.label} changed while it was read.",
            why="Something writes to it; move a finished file into place instead.",
            next_command=f"ls -l {file.path}",
            path=file.label,
        )
    rows = reading.rows_read - rows_before
    return DataSource(path=file.label, sha256=digest, rows=rows, role=file.role)


def _report(reading: Reading) -> None:
    """Log what was read and how it was understood."""
    logger.info(
        "read %d rows from %d file(s): %d usable, %d bad, %d file(s) unreadable",
        reading.rows_read,
        len(reading.sources),
        len(reading.rows),
        reading.bad.total(),
        reading.unreadable,
    )
    for columns, count in reading.columns.most_common(3):
        names = {part: name for part, name in asdict(columns).items() if name is not None}
        logger.info("columns of %d rows: %s", count, names)
    if reading.bad:
        logger.warning("quarantined rows by reason: %s", dict(reading.bad.most_common()))
    if reading.rows:
        chinese = sum(bool(HAN.search(row["question"])) for row in reading.rows) / len(reading.rows)
        thinking = sum(bool(row["reasoning"]) for row in reading.rows) / len(reading.rows)
        logger.info(
            "%.0f %% of questions in Chinese, %.0f %% of rows with reasoning",
            100 * chinese,
            100 * thinking,
        )


def _check(reading: Reading, max_bad_fraction: float, quarantine: Path) -> None:
    """The circuit breaker."""
    bad, read, files = reading.bad.total(), reading.rows_read, len(reading.sources)
    numbers = ", ".join(f"{reason} {count}" for reason, count in reading.bad.most_common())
    facts = {
        "rows_read": read,
        "bad": bad,
        "unreadable_files": reading.unreadable,
        "reasons": dict(reading.bad),
        "quarantine_path": str(quarantine),
    }
    if bad > max_bad_fraction * read or reading.unreadable > max_bad_fraction * files:
        raise DataLoadingError(
            f"{bad} of {read} rows are bad ({numbers or 'none'}) and {reading.unreadable} of "
            f"{files} file(s) unreadable; max_bad_fraction allows {max_bad_fraction:.0%}.",
            why=f"Every bad row is listed with file, line and reason in {quarantine}.",
            next_command=f"head {quarantine}",
            **facts,
        )
    if not reading.rows:
        raise DataLoadingError(
            f"No usable row in {files} file(s): {read} rows read, {bad} bad.",
            why="The files are empty, or all of their rows were quarantined.",
            next_command=f"head {quarantine}",
            **facts,
        )
