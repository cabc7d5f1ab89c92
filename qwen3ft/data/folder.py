"""The folder of a prepared data set, and the record of what is in it.

    train.arrow, dev.arrow   tokenised rows (see `token_table`)
    known_rows.npy           hashes of the rows that training may use
    test.jsonl               held-out questions with their answers, for the inference test
    quarantine.jsonl         bad rows, each with its place and reason
    left_out.jsonl           good rows that are not used: repeated, leaked, too long, over a cap
    personal_data.jsonl      places where keys or personal data were found, without them
    manifest.json            sha256 of every file, and the `DatasetManifest`

The folder is complete or absent, and used only while every file has its sha256. The manifest's
counts add up to the rows read.
"""

from __future__ import annotations

import json
import shutil
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
from pydantic import ValidationError

from qwen3ft.data.columns import Columns
from qwen3ft.data.known_rows import write_known_rows
from qwen3ft.data.layouts import NOT_AN_EXAMPLE
from qwen3ft.data.placement import DUPLICATES, Fate, Placement
from qwen3ft.data.reading import FINDINGS_NAME, NO_REASONING, Reading
from qwen3ft.data.row_table import RowTable
from qwen3ft.data.rows import UNREADABLE_FILE
from qwen3ft.data.splits import Mask
from qwen3ft.data.tokenizing import Tokens
from qwen3ft.disk.locks import try_lock
from qwen3ft.disk.manifests import build_folder, find_damage, read_manifest_facts
from qwen3ft.logs import mask_secrets
from qwen3ft.records.data import DatasetManifest, DataSource, LongRow, QaRow
from qwen3ft.text.plain import escaped_line

QUARANTINE, LEFT_OUT, _TEST_FILE = "quarantine.jsonl", "left_out.jsonl", "test.jsonl"
_SPLIT_FILES = ("train.arrow", "dev.arrow")
_HISTOGRAM_BINS = 24
_LONGEST_ROWS, _MOST_CANDIDATES = 5, 200
_MOST_MAPPINGS, _MOST_MAPPING_CHARACTERS = 8, 300


@dataclass
class Prepared:
    """All results of the data stage, from which the folder is written."""

    reading: Reading
    table: RowTable
    placement: Placement
    tokens: Tokens
    max_sequence_length: int
    known_rows: str | None = None
    degraded: tuple[str, ...] = ()
    skipped: tuple[str, ...] = ()
    warnings: tuple[str, ...] = ()


def account(prepared: Prepared, target: Path, digest: str) -> DatasetManifest:
    """Return the manifest of `prepared`; its counts add up to the rows read, exactly."""
    reading, placement = prepared.reading, prepared.placement
    layouts: Counter[str] = Counter()
    for columns, rows in reading.counts.columns.items():
        layouts[columns.layout] += rows
    mappings = reading.counts.columns.most_common()
    manifest = DatasetManifest(
        path=str(target),
        digest=digest,
        sources=_sources(prepared),
        rows_read=reading.rows_read,
        train=prepared.tokens.train,
        dev=prepared.tokens.dev,
        test_rows=placement.count(Fate.TEST),
        quarantined=reading.bad.total() + placement.count(Fate.NO_TRAINED_TOKEN),
        too_long=placement.count(Fate.TOO_LONG),
        duplicates=placement.count(*DUPLICATES),
        not_used=placement.count(Fate.NOT_USED)
        + reading.without_reasoning_left_out
        + reading.marked_left_out,
        reasons=_reasons(prepared),
        quarantine_path=str(target / QUARANTINE),
        not_listed=reading.not_listed,
        layouts=dict(layouts.most_common()),
        columns=mappings[0][0].parts(),
        other_columns=_by_mapping(mappings),
        unused=dict(reading.counts.unused.most_common()),
        changed=dict(reading.counts.changed.most_common()),
        usable_rows=reading.usable,
        chinese_rows=reading.chinese,
        reasoning_rows=reading.with_reasoning,
        conversations=reading.conversations,
        near_duplicates=placement.near_duplicates,
        shortened=prepared.tokens.shortened,
        not_compared=placement.not_compared,
        personal_data=dict(reading.personal.most_common()),
        known_rows=prepared.known_rows,
        new_rows=placement.new_rows,
        max_sequence_length=prepared.max_sequence_length,
        length_histogram=histogram(prepared.tokens.lengths[prepared.tokens.lengths > 0]),
        longest=_longest(prepared),
        warnings=prepared.warnings,
        degraded=prepared.degraded,
        skipped=prepared.skipped,
    )
    went_somewhere = (
        *(manifest.train.rows, manifest.dev.rows, manifest.test_rows, manifest.quarantined),
        *(manifest.too_long, manifest.duplicates, manifest.not_used),
    )
    # An assertion, not an error: no data can break this, only a fault of this code.
    assert manifest.rows_read == sum(went_somewhere), manifest
    return manifest


def write_folder(target: Path, manifest: DatasetManifest, prepared: Prepared) -> None:
    """Write the folder of `manifest`; an older one stays until it is complete.

    The quarantine that was written beside `target` while reading moves into it.
    """
    beside, work = quarantine_beside(target), prepared.reading.folder

    def fill(folder: Path) -> None:
        for name in (*_SPLIT_FILES, FINDINGS_NAME):
            shutil.move(work / name, folder / name)
        questions = (_question(row) for _, row in _rows(prepared, Fate.TEST))
        as_json = json.JSONEncoder(ensure_ascii=False).encode  # json.dumps makes one for each
        _write_lines(folder / _TEST_FILE, map(as_json, questions))
        _write_lines(folder / LEFT_OUT, _left_out(prepared))
        # Copied, and removed at the end: if this fails, the list of bad rows is what helps.
        shutil.copyfile(beside, folder / QUARANTINE)
        write_known_rows(folder, prepared.reading.keys.build(), _for_training(prepared))

    build_folder(target, fill, manifest.model_dump(mode="json", exclude={"path"}))
    beside.unlink()


@contextmanager
def work_folder(target: Path) -> Iterator[Path]:
    """Make an empty scratch folder beside `target`, and remove it afterwards."""
    folder = target.with_name(f".{target.name}.work")
    # A worker that was killed leaves its own.
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


@contextmanager
def only_builder(target: Path, waiting: Callable[[], None]) -> Iterator[bool]:
    """Let no other process build `target` meanwhile; yield whether one just did.

    Args:
        target: Folder to be built.
        waiting: Called once a second while another process builds it.
    """
    target.parent.mkdir(parents=True, exist_ok=True)
    waited = False
    while True:
        with try_lock(target.with_name(f".{target.name}.lock"), wait_seconds=1.0) as is_held:
            if is_held:
                yield waited
                return
        waited = True
        waiting()


def quarantine_beside(target: Path) -> Path:
    """Return the file of the quarantine until the folder is complete; it stays if that fails."""
    return target.with_name(f"{target.name}.{QUARANTINE}")


def read_manifest(target: Path) -> DatasetManifest | None:
    """Return the manifest of a folder; None if a file is missing or has another sha256."""
    if find_damage(target) is not None:
        return None
    # Paths are those of today: the cache may have been moved since.
    places = {"path": str(target), "quarantine_path": str(target / QUARANTINE)}
    try:
        return DatasetManifest.model_validate({**read_manifest_facts(target), **places})
    except ValidationError:  # written by a version with other fields
        return None


def histogram(lengths: np.ndarray) -> tuple[tuple[int, int], ...]:
    """Return (upper edge, rows) of bins of equal width, up to the 99.5th percentile.

    The last bin holds everything above.
    """
    if not len(lengths):
        return ()
    # One very long row would otherwise squeeze all others into the first bin.
    reach = max(int(np.percentile(lengths, 99.5, method="higher")), _HISTOGRAM_BINS)
    width = -(-reach // _HISTOGRAM_BINS)
    counts = np.bincount(np.minimum((lengths - 1) // width, _HISTOGRAM_BINS - 1))
    return tuple((width * (number + 1), int(count)) for number, count in enumerate(counts))


def _for_training(prepared: Prepared) -> Mask:
    """Return the rows that training may use, caps aside."""
    # With rows over a cap: they could have been trained on, and must not look new the next time.
    return np.isin(prepared.placement.fates, (Fate.TRAIN, Fate.NOT_USED))


def _sources(prepared: Prepared) -> tuple[DataSource, ...]:
    sources = prepared.reading.sources
    numbers = prepared.reading.keys.build().source[_for_training(prepared)]
    counts = np.bincount(numbers, minlength=len(sources)).tolist()
    return tuple(
        source.model_copy(update={"for_training": count})
        for source, count in zip(sources, counts, strict=True)
    )


def _reasons(prepared: Prepared) -> dict[str, int]:
    """Count missing rows by reason code; the manifest counts the other reasons by name."""
    placement = prepared.placement
    fates = (Fate.LEAKAGE, Fate.NEAR_LEAKAGE, Fate.NEAR_DUPLICATE, Fate.NO_TRAINED_TOKEN)
    extra = Counter({fate.name.lower(): placement.count(fate) for fate in fates})
    extra[UNREADABLE_FILE] = prepared.reading.unreadable
    extra[NO_REASONING] = prepared.reading.without_reasoning_left_out
    extra[NOT_AN_EXAMPLE] = prepared.reading.marked_left_out
    return dict(prepared.reading.bad) | dict(+extra)


def _by_mapping(mappings: Sequence[tuple[Columns, int]]) -> dict[str, int]:
    """Return the rows of all mappings of columns but the first, by the columns in words."""
    rows_by_mapping: Counter[str] = Counter()
    usual = mappings[0][0].parts()
    for columns, rows in mappings[1:]:
        if (parts := columns.parts()) != usual:
            words = ", ".join(f"{part} = {name}" for part, name in parts.items())
            rows_by_mapping[escaped_line(mask_secrets(words))[:_MOST_MAPPING_CHARACTERS]] += rows
    return dict(rows_by_mapping.most_common(_MOST_MAPPINGS))


def _longest(prepared: Prepared) -> tuple[LongRow, ...]:
    lengths = prepared.tokens.lengths
    order = np.argsort(-lengths, kind="stable")[:_MOST_CANDIDATES]
    found: dict[tuple[str, int], LongRow] = {}
    for position in order[lengths[order] > 0].tolist():
        # The rows of an array may all be in one line; its longest stands for it.
        row = _long_row(prepared, position)
        found.setdefault((row.file, row.line), row)
        if len(found) == _LONGEST_ROWS:
            break
    return tuple(found.values())


def _long_row(prepared: Prepared, position: int) -> LongRow:
    [row] = prepared.table.rows([position])
    return LongRow(
        file=row["file"],
        line=row["line"],
        tokens=int(prepared.tokens.lengths[position]),
        at_least=bool(prepared.tokens.bounded[position]),
    )


def _rows(prepared: Prepared, *fates: Fate) -> Iterator[tuple[int, QaRow]]:
    """Yield the rows with one of `fates` and their positions, in reading order."""
    return prepared.table.rows_where(np.isin(prepared.placement.fates, fates))


def _question(row: QaRow) -> dict[str, Any]:
    question: dict[str, Any] = {
        "question": row["question"],
        "answer": row["answer"],
        "reasoning": row["reasoning"],
        "split": row["kind"] or "test",
    }
    if row["messages"]:
        question |= {"messages": row["messages"], "tools": row["tools"]}
    return question


def _left_out(prepared: Prepared) -> Iterator[str]:
    fates, tokens = prepared.placement.fates, prepared.tokens
    reasons = [fate.name.lower() for fate in Fate]
    is_used = np.isin(fates, (Fate.TRAIN, Fate.DEV, Fate.TEST))
    as_json = cache(json.JSONEncoder(ensure_ascii=False).encode)
    # Nearly all rows may be left out, as repeats: their texts are not read again, and the names of
    # files alone are worth an encoder, which takes several times as long as the rest of a line.
    for position, (file, line) in prepared.table.lines_where(~is_used):
        length = ""
        if tokens.lengths[position]:
            name = "tokens_at_least" if tokens.bounded[position] else "tokens"
            length = f', "{name}": {tokens.lengths[position]}'
        reason = reasons[fates[position]]
        yield f'{{"file": {as_json(file)}, "line": {line}, "reason": "{reason}"{length}}}'


def _write_lines(path: Path, lines: Iterable[str]) -> None:
    with path.open("w", encoding="utf-8") as stream:
        for line in lines:
            stream.write(f"{line}\n")
