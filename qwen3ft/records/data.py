"""Records of the data stage: input files, rows, and where each row went. Lengths are in tokens."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, TypedDict

from pydantic import Field

from qwen3ft.config import TrainingConfig
from qwen3ft.records.base import Record

Role = Literal["train", "dev", "test"]


@dataclass(frozen=True)
class SourceFile:
    """One input file, and what it was like when it was fingerprinted."""

    label: str
    """Name for people: the path as given, embedded:..., or the hub's address with the commit."""
    path: Path
    role: Role
    sha256: str = ""
    """Digest of the bytes on disk, compressed or not."""
    size_bytes: int = -1
    modified_ns: int = -1


class ResolvedSources(Record):
    """The input files of a run, in reading order."""

    config: TrainingConfig = Field(description="The config, with hub data sets pinned.")
    files: tuple[SourceFile, ...]
    degraded: tuple[str, ...] = Field((), description="Marks of rows that stand in for others.")
    skipped: tuple[str, ...] = Field((), description="Files that are not read, with the reasons.")

    @property
    def fingerprints(self) -> list[list[str]]:
        """Label, sha256 and role of each file: a change of any part means other data."""
        return [[file.label, file.sha256, file.role] for file in self.files]


class DataSource(Record):
    """One input file as it was read."""

    path: str
    sha256: str
    rows: int
    role: Role
    for_training: int = Field(0, description="Rows that training may use, caps aside.")
    notes: tuple[str, ...] = Field((), description="Its encoding, its sheet: as it was read.")


class LengthSummary(Record):
    """Token lengths of the rows of one split."""

    rows: int
    tokens: int
    trained_tokens: int
    longest_tokens: int
    median_tokens: int
    p95_tokens: int


class DataChange(Record):
    """Difference between a run's data and that of the champion."""

    since: str | None = Field(None, description="Champion compared with, if there is one.")
    new_files: tuple[str, ...] = ()
    changed_files: tuple[str, ...] = ()
    gone_files: tuple[str, ...] = ()
    new_rows: int = Field(0, description="Rows for training, caps aside, that are new to it.")
    unchanged: bool = Field(False, description="Same rows and settings as the champion's.")
    new_rows_by_file: dict[str, int] = Field(default_factory=dict)
    examples: tuple[str, ...] = Field((), description="Questions of a few new rows.")
    again: str = Field("", description="Reason to train although nothing is new.")
    champion_paths: tuple[str, ...] | None = Field(None, description="Its data_paths, if known.")


class LongRow(Record):
    """One of the longest rows."""

    file: str
    line: int
    tokens: int
    at_least: bool = Field(False, description="It was not tokenised: its bytes say that much.")


class DatasetManifest(Record):
    """Tokenised rows on disk, and the place of every row that was read.

    `rows_read == train + dev + test + quarantined + too_long + duplicates + not_used`, always.
    """

    path: str = Field(description="Folder with train.arrow, dev.arrow (tokenised) and test.jsonl.")
    digest: str = Field(description="sha256 over the rows used, the template and the settings.")
    sources: tuple[DataSource, ...]
    rows_read: int
    train: LengthSummary
    dev: LengthSummary
    test_rows: int
    quarantined: int
    too_long: int
    duplicates: int = Field(description="Exact repeats, leaks, and near-duplicates left out.")
    not_used: int = Field(0, description="Left out by a setting: caps, rows without reasoning.")
    reasons: dict[str, int] = Field({}, description="Rows left out, by reason code.")
    quarantine_path: str | None = None
    not_listed: int = Field(0, description="Rows left out that the quarantine has no room for.")
    layouts: dict[str, int] = Field({}, description="Rows by layout.")
    columns: dict[str, str] = Field({}, description="Column by part, as most rows have it.")
    other_columns: dict[str, int] = Field(
        {}, description="Other sets of columns, as 'part = column, ...', with their rows."
    )
    unused: dict[str, int] = Field(
        {}, description="Columns, keys of messages and flags that are not used, with their rows."
    )
    skipped: tuple[str, ...] = Field((), description="Files that are not read, with the reasons.")
    changed: dict[str, int] = Field({}, description="Rows by changes of form while reading.")
    usable_rows: int = Field(0, description="Not quarantined, and not left out without reasoning.")
    chinese_rows: int = Field(0, description="Usable rows whose question has Chinese in it.")
    reasoning_rows: int = Field(0, description="Usable rows with reasoning.")
    conversations: int = Field(0, description="Usable rows of more than a question and an answer.")
    near_duplicates: int = Field(0, description="Training rows nearly the same as another one.")
    not_compared: int = Field(0, description="Rows too large to look for near-duplicates of them.")
    shortened: int = Field(0, description="Rows whose reasoning lost its middle to fit.")
    personal_data: dict[str, int] = Field({}, description="Rows by kind found.")
    known_rows: str | None = Field(None, description="File of the rows seen before, if compared.")
    new_rows: int = Field(0, description="Training rows not among the known ones.")
    max_sequence_length: int = 0
    length_histogram: tuple[tuple[int, int], ...] = ()
    """(upper edge in tokens, rows) of all tokenised rows, too long ones included."""
    longest: tuple[LongRow, ...] = ()
    warnings: tuple[str, ...] = Field((), description="Problems, each with a setting that helps.")
    degraded: tuple[str, ...] = ()


MessageRole = Literal["system", "user", "assistant", "tool"]


class Message(TypedDict, total=False):
    """One turn; only the assistant has `reasoning` and `tool_calls`."""

    role: MessageRole
    content: str
    reasoning: str
    tool_calls: list[dict[str, Any]]
    """Each {"name": str, "arguments": dict}."""
    trained: bool
    """False if the data says that this answer carries no loss."""


class QaRow(TypedDict):
    """One usable row; texts have no blank line before and nothing white behind; '' for none."""

    question: str
    """The last user message."""
    answer: str
    """The last assistant message, without its reasoning."""
    reasoning: str
    messages: list[Message]
    """The whole conversation where it is more than one question and its answer, else []."""
    tools: list[dict[str, Any]]
    kind: str
    """Group of questions to report on."""
    group: str
    """Source key: rows with the same one are held out together."""
    role: Role
    file: str
    line: int
    offset: int
    """Byte where the row starts in the uncompressed file; -1 for parquet and sheets."""


@dataclass(frozen=True, slots=True)
class BadRow:
    """One row that cannot be used; `line` starts at 1, and 0 is the whole file.

    Of parquet and sheets it is the number of the row.
    """

    file: str
    line: int
    offset: int
    reason: str
    excerpt: str


class RejectedRowError(ValueError):
    """A row cannot be used; the message is the reason code."""
