"""Reading of all input files: usable rows go to the row table, bad ones to the quarantine file.

Every row read is in one of the two, and only its keys stay in memory. The stage ends with an error
if a file changed, if there are no usable rows, or if more are bad than the config allows. A file
that breaks off is one line of the quarantine (line 0); the rows it gave before count.
"""

from __future__ import annotations

import json
import re
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import TextIO

from qwen3ft.chat.conversation import as_lines, texts_of
from qwen3ft.config import TrainingConfig
from qwen3ft.data import safety
from qwen3ft.data.layouts import NOT_AN_EXAMPLE
from qwen3ft.data.near_duplicates import NearDuplicates
from qwen3ft.data.refusal import PERSONAL_DATA, check_usable
from qwen3ft.data.row_features import RowFeatures
from qwen3ft.data.row_table import BatchPlace, RowWriter
from qwen3ft.data.rows import (
    UNREADABLE_FILE,
    RowCounts,
    excerpt,
    read_file,
    rules_of,
)
from qwen3ft.data.splits import KeysBuilder
from qwen3ft.errors import DataLoadingError
from qwen3ft.logs import get_logger
from qwen3ft.records.data import BadRow, DataSource, QaRow, SourceFile
from qwen3ft.text.commands import shell_line
from qwen3ft.units import MIB

logger = get_logger("data")

NO_REASONING = "no_reasoning"
NOT_LISTED = "not_listed"
"""Reason in the last line of a quarantine that does not list all rows."""
FINDINGS_NAME = "personal_data.jsonl"
MOST_LISTED_BYTES = 64 * MIB
"""Size of a quarantine file past which rows are only counted."""
_BAD_ROW_NAMES = tuple(one.name for one in fields(BadRow))
_PROGRESS_ROWS = 20_000
_MOST_LOGGED = 20
FeaturesOf = Callable[[Iterable[BatchPlace]], Iterator[RowFeatures]]
"""Returns the features of each batch of the row table, in order."""

_HAN = re.compile("[\u4e00-\u9fff]")


@dataclass
class Reading:
    """Content of the files: counts, keys, and the table of usable rows."""

    files: Sequence[SourceFile]
    folder: Path
    """Work folder with the row table and the list of findings."""
    places: list[BatchPlace] = field(default_factory=list)
    """Batches of the row table."""
    keys: KeysBuilder = field(default_factory=KeysBuilder)
    """Keys of the usable rows, in reading order."""
    near: NearDuplicates = field(default_factory=NearDuplicates)
    """Signatures of the usable rows, likewise."""
    not_compared: list[int] = field(default_factory=list)
    """Usable rows without a signature, since they are too large."""
    sources: list[DataSource] = field(default_factory=list)
    bad: Counter[str] = field(default_factory=Counter)
    """Bad rows by reason code."""
    unreadable: int = 0
    """Files that could not be read, or not to their end."""
    counts: RowCounts = field(default_factory=RowCounts)
    usable: int = 0
    chinese: int = 0
    """Rows with Chinese characters in the question."""
    with_reasoning: int = 0
    conversations: int = 0
    """Rows of more than one question and its answer."""
    earlier_reasoning: int = 0
    """Rows with reasoning in an answer before the last one."""
    without_reasoning_left_out: int = 0
    """Good rows that the config leaves out because they have no reasoning."""
    marked_left_out: int = 0
    """Rows that the data itself marks as bad examples."""
    not_listed: int = 0
    """Rows left out that the quarantine file has no room for; they are counted all the same."""
    personal: Counter[str] = field(default_factory=Counter)
    """Rows with personal data or secrets, by kind."""

    @property
    def rows_read(self) -> int:
        """Number of good and bad rows of all files."""
        left_out = self.without_reasoning_left_out + self.marked_left_out
        return self.usable + self.bad.total() + left_out


def rows_path(folder: Path) -> Path:
    """Return the file of the row table in a work folder."""
    return folder / "rows.arrow"


def read_sources(
    files: Sequence[SourceFile],
    config: TrainingConfig,
    folder: Path,
    quarantine: Path,
    features_of: FeaturesOf,
    progress: Callable[[int], None] = lambda _: None,
) -> Reading:
    """Read every file; usable rows go to a table in `folder`, bad ones to the file `quarantine`.

    Args:
        files: Fingerprinted files, in order.
        config: How to map and check rows.
        folder: An existing work folder.
        quarantine: Replaced by the list of bad rows, one JSON object a line; past
            `MOST_LISTED_BYTES` its last line says how many more there are.
        features_of: Called once with all batches of the table, each as soon as it is written.
        progress: Receives the number of rows read so far, now and then.

    Raises:
        DataLoadingError: no usable row, too many bad ones, or a file has changed.
    """
    reading = Reading(files, folder)
    with (
        quarantine.open("w", encoding="utf-8") as bad,
        (folder / FINDINGS_NAME).open("w", encoding="utf-8") as findings,
        RowWriter(rows_path(folder)) as table,
    ):
        reader = _Reader(config, reading, table, bad, findings, progress)
        for features in features_of(reader.batches()):
            reading.not_compared += [len(reading.keys) + row for row in features.not_compared]
            reading.keys.extend(features.keys)
            reading.near.add(features.bands)
        reader.end()
    _report(reading)
    check_usable(reading, config, quarantine)
    return reading


@dataclass
class _Reader:
    """Sorts rows into usable and bad ones, and counts them."""

    config: TrainingConfig
    reading: Reading
    table: RowWriter
    quarantine: TextIO
    findings: TextIO
    progress: Callable[[int], None]
    started: float = field(default_factory=time.monotonic)
    listed_bytes: int = 0

    def batches(self) -> Iterator[BatchPlace]:
        """Read all files; yield each batch of usable rows once it is in the table."""
        for number, file in enumerate(self.reading.files):
            for place in self._read(number, file):
                self.reading.places.append(place)
                yield place
        if last := self.table.flush():
            self.reading.places.append(last)
            yield last

    def _read(self, number: int, file: SourceFile) -> Iterator[BatchPlace]:
        """Add one file's rows; yield each batch that they fill."""
        reading = self.reading
        # Before and after: the rows must be those of the sha256 that names the folder.
        _check_unchanged(file)
        rows_before = reading.rows_read
        for count, row in enumerate(
            read_file(file, rules_of(self.config), reading.counts), rows_before + 1
        ):
            if isinstance(row, BadRow):
                self._refuse(row)
            elif not row["reasoning"] and self.config.rows_without_reasoning == "leave_out":
                reading.without_reasoning_left_out += 1
            elif (problem := self._problem(row)) is not None:
                self._refuse(problem)
            else:
                self._count(row)
                if full := self.table.append(row, number):
                    yield full
            if count % _PROGRESS_ROWS == 0:
                self._report_progress(count)
        _check_unchanged(file)
        rows = reading.rows_read - rows_before
        notes = tuple(reading.counts.notes.get(file.label, ()))
        for note in notes:
            logger.info("%s: %s", file.label, note)
        reading.sources.append(
            DataSource(path=file.label, sha256=file.sha256, rows=rows, role=file.role, notes=notes)
        )

    def _count(self, row: QaRow) -> None:
        reading = self.reading
        reading.usable += 1
        if not row["question"].isascii():
            reading.chinese += _HAN.search(row["question"]) is not None
        reading.with_reasoning += bool(row["reasoning"])
        if messages := row["messages"]:
            reading.conversations += 1
            reading.earlier_reasoning += any(turn.get("reasoning") for turn in messages[:-1])

    def _problem(self, row: QaRow) -> BadRow | None:
        """Write down personal data in a sound row; return it as a bad row if that is configured."""
        if self.config.personal_data == "off":
            return None
        texts = (row["question"], row["answer"], row["reasoning"])
        text = "\n".join(texts_of(row["messages"], row["tools"], as_lines) or texts)
        found = safety.scan(text)
        if not found:
            return None
        kinds = sorted({finding.kind for finding in found})
        self.reading.personal.update(kinds)
        place = {"file": row["file"], "line": row["line"], "kinds": kinds}
        self.findings.write(json.dumps(place, ensure_ascii=False) + "\n")
        if self.config.personal_data == "report":
            return None
        # Masked before it is cut: no pattern finds half a key.
        masked = excerpt(safety.mask(text))
        return BadRow(row["file"], row["line"], row["offset"], PERSONAL_DATA, masked)

    def end(self) -> None:
        """Say in the quarantine how many rows are not listed, if any."""
        if count := self.reading.not_listed:
            self._list(BadRow("", 0, -1, NOT_LISTED, f"{count:,} more rows"))

    def _list(self, row: BadRow) -> None:
        entry = {name: getattr(row, name) for name in _BAD_ROW_NAMES}  # asdict is slow
        line = json.dumps(entry, ensure_ascii=False) + "\n"
        self.listed_bytes += len(line.encode("utf-8", "surrogatepass"))
        self.quarantine.write(line)

    def _refuse(self, row: BadRow) -> None:
        # Of unreadable files there are few, and each may stand for many rows.
        if self.listed_bytes < MOST_LISTED_BYTES or row.reason == UNREADABLE_FILE:
            self._list(row)
        else:
            self.reading.not_listed += 1
        if row.reason == NOT_AN_EXAMPLE:
            self.reading.marked_left_out += 1
        elif row.reason == UNREADABLE_FILE:
            self.reading.unreadable += 1
            logger.warning("%s cannot be read: %s", row.file, row.excerpt)
        else:
            self.reading.bad[row.reason] += 1

    def _report_progress(self, rows: int) -> None:
        self.progress(rows)
        seconds = max(time.monotonic() - self.started, 1e-6)
        logger.info("read %s rows, %s rows/s", f"{rows:,}", f"{rows / seconds:,.0f}")


def _check_unchanged(file: SourceFile) -> None:
    """Raise DataLoadingError if a file is not the one that was fingerprinted."""
    try:
        found = file.path.stat()
        is_same = (found.st_size, found.st_mtime_ns) == (file.size_bytes, file.modified_ns)
    except OSError:
        is_same = False
    if not is_same:
        raise DataLoadingError(
            f"{file.label} changed while the data was being prepared.",
            why="Something writes to it; move a finished file into place instead.",
            next_command=shell_line("ls", "-l", file.path),
            path=file.label,
        )


def _report(reading: Reading) -> None:
    """Log what was read, and as which columns."""
    logger.info(
        "read %d rows from %d file(s): %d usable, %d bad, %d file(s) unreadable",
        *(reading.rows_read, len(reading.sources), reading.usable),
        *(reading.bad.total(), reading.unreadable),
    )
    for columns, count in reading.counts.columns.most_common(3):
        logger.info("%d rows as %s: %s", count, columns.layout, columns.parts())
    if unused := reading.counts.unused.most_common(_MOST_LOGGED):
        logger.warning("not used, by rows: %s", dict(unused))
    if reading.bad:
        logger.warning("quarantined rows by reason: %s", dict(reading.bad.most_common()))
    if reading.personal:
        logger.warning("rows with personal data or keys: %s", dict(reading.personal.most_common()))
    if reading.usable:
        logger.info(
            "%.0f %% of questions in Chinese, %.0f %% of rows with reasoning",
            100 * reading.chinese / reading.usable,
            100 * reading.with_reasoning / reading.usable,
        )
