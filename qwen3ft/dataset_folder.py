"""Prepared rows as a folder on disk, and the account of where every row went.

    <target>/train/  dev/        datasets: input_ids, labels (-100 over the prompt), length
             test.jsonl          question, answer, reasoning, split
             quarantine.jsonl    bad rows: file, line, reason, excerpt
             left_out.jsonl      good rows left out: file, line, reason; tokens if too long
             manifest.json       last; its facts are the `DatasetManifest`

Guarantees: the folder is complete or absent; the counts of its manifest add up to the rows read, or
it is not written. Rows beyond `max_rows` are counted but not listed.
"""

from __future__ import annotations

import json
import shutil
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import ValidationError

from qwen3ft.errors import DataLoadingError
from qwen3ft.logs import get_logger
from qwen3ft.reading import Reading
from qwen3ft.records import DatasetManifest, LengthSummary
from qwen3ft.rows import UNREADABLE_FILE, QaRow
from qwen3ft.splits import LEAKAGE
from qwen3ft.storage import build_folder, find_damage, read_manifest_facts

if TYPE_CHECKING:
    from datasets import Dataset

QUARANTINE, LEFT_OUT, TEST = "quarantine.jsonl", "left_out.jsonl", "test.jsonl"
TOO_LONG = "too_long"
SAVED_COLUMNS = ["input_ids", "labels", "length"]

logger = get_logger("data")


@dataclass(frozen=True)
class Tokenized:
    """The rows that fit, and how long those are that do not."""

    dataset: Dataset
    """Columns input_ids, labels, length; one row for each of `kept`."""
    kept: list[int]
    """Position of each row of `dataset` in what was tokenised."""
    too_long: dict[int, int]
    """Position of each row left out: its length in tokens."""


@dataclass(frozen=True)
class Prepared:
    """Everything the data stage decided about the rows it read."""

    reading: Reading
    rows: list[QaRow]
    """Usable rows without repeats; the positions below count in this list."""
    repeats: list[tuple[QaRow, str]]
    tokenized: Tokenized
    train: list[int]
    dev: list[int]
    test: list[int]
    not_used: list[int]
    degraded: tuple[str, ...] = field(default=())


def account(prepared: Prepared, target: Path, digest: str) -> DatasetManifest:
    """The manifest of `prepared`; its counts add up to the rows read, exactly."""
    reading = prepared.reading
    columns = reading.columns.most_common(1)[0][0]
    manifest = DatasetManifest(
        path=str(target),
        digest=digest,
        sources=tuple(reading.sources),
        rows_read=reading.rows_read,
        train=summarize(_select(prepared, prepared.train)),
        dev=summarize(_select(prepared, prepared.dev)),
        test_rows=len(prepared.test),
        quarantined=reading.bad.total(),
        too_long=len(prepared.tokenized.too_long),
        duplicates=len(prepared.repeats),
        not_used=len(prepared.not_used),
        reasons=_reasons(prepared),
        quarantine_path=str(target / QUARANTINE),
        question_field=columns.question or "question",
        answer_field=columns.answer or "answer",
        degraded=prepared.degraded,
    )
    went_somewhere = (
        *(manifest.train.rows, manifest.dev.rows, manifest.test_rows, manifest.quarantined),
        *(manifest.too_long, manifest.duplicates, manifest.not_used),
    )
    assert manifest.rows_read == sum(went_somewhere), manifest
    return manifest


def check_not_empty(prepared: Prepared, target: Path, max_sequence_length: int) -> None:
    """Make sure there is something to train on, to stop by, and to test with.

    Raises:
        DataLoadingError: a split has no row, with the numbers of those lost.
    """
    sizes = {name: len(getattr(prepared, name)) for name in ("train", "dev", "test")}
    if all(sizes.values()):
        return
    reading, too_long = prepared.reading, prepared.tokenized.too_long
    empty = " and ".join(name for name, size in sizes.items() if not size)
    raise DataLoadingError(
        f"No rows are left for {empty}: of {reading.rows_read} read, {reading.bad.total()} are "
        f"bad, {len(prepared.repeats)} repeated or held out elsewhere, {len(too_long)} longer than "
        f"{max_sequence_length} tokens (the longest {max(too_long.values(), default=0)}).",
        why="Each split needs a row; three different questions are the least that can be divided.",
        next_command=f"head {quarantine_beside(target)}",
        too_long=len(too_long),
        **sizes,
    )


def write_folder(target: Path, manifest: DatasetManifest, prepared: Prepared) -> None:
    """Write the folder of `manifest`; an older one stays until it is complete.

    The quarantine that was written beside `target` while reading moves into it.
    """
    beside = quarantine_beside(target)

    def fill(folder: Path) -> None:
        for name, positions in (("train", prepared.train), ("dev", prepared.dev)):
            split = _select(prepared, positions).select_columns(SAVED_COLUMNS)
            split.save_to_disk(folder / name)
        _write_lines(folder / TEST, (_question(prepared.rows[i]) for i in prepared.test))
        _write_lines(folder / LEFT_OUT, _left_out(prepared))
        shutil.copyfile(beside, folder / QUARANTINE)

    build_folder(target, fill, manifest.model_dump(mode="json", exclude={"path"}))
    beside.unlink()


def quarantine_beside(target: Path) -> Path:
    """Where the quarantine is written until the folder is complete; it stays if that fails."""
    return target.with_name(f"{target.name}.{QUARANTINE}")


def read_manifest(target: Path) -> DatasetManifest | None:
    """The manifest of a folder made by `write_folder`, if every file of it holds."""
    if find_damage(target) is not None:
        return None
    places = {"path": str(target), "quarantine_path": str(target / QUARANTINE)}
    try:
        return DatasetManifest.model_validate({**read_manifest_facts(target), **places})
    except ValidationError:
        return None


def summarize(dataset: Dataset) -> LengthSummary:
    """Token lengths of a tokenised split; percentiles are lengths that occur."""
    import numpy as np

    if not len(dataset):
        return LengthSummary(
            rows=0, tokens=0, trained_tokens=0, longest_tokens=0, median_tokens=0, p95_tokens=0
        )
    columns = dataset.select_columns(["length", "prompt_length"])[:]
    lengths, prompts = np.asarray(columns["length"]), np.asarray(columns["prompt_length"])
    median, p95 = np.percentile(lengths, (50, 95), method="higher")
    return LengthSummary(
        rows=len(lengths),
        tokens=int(lengths.sum()),
        trained_tokens=int((lengths - prompts).sum()),
        longest_tokens=int(lengths.max()),
        median_tokens=int(median),
        p95_tokens=int(p95),
    )


def report(manifest: DatasetManifest, too_long: Mapping[int, int]) -> None:
    """Log where the rows went, and how long they are."""
    logger.info(
        "%d rows read = %d train + %d dev + %d test + %d quarantined + %d too long "
        "+ %d duplicates + %d not used",
        *(manifest.rows_read, manifest.train.rows, manifest.dev.rows, manifest.test_rows),
        *(manifest.quarantined, manifest.too_long, manifest.duplicates, manifest.not_used),
    )
    for name, split in (("train", manifest.train), ("dev", manifest.dev)):
        logger.info(
            "%s: %d tokens, %d of them trained; median %d, 95 %% up to %d, longest %d",
            *(name, split.tokens, split.trained_tokens),
            *(split.median_tokens, split.p95_tokens, split.longest_tokens),
        )
    if too_long:
        logger.warning(
            "%d rows are too long and left out; the longest has %d tokens (see %s)",
            *(len(too_long), max(too_long.values()), LEFT_OUT),
        )


def _select(prepared: Prepared, positions: Sequence[int]) -> Dataset:
    """The tokenised rows at `positions`, in that order."""
    index = {position: number for number, position in enumerate(prepared.tokenized.kept)}
    return prepared.tokenized.dataset.select([index[position] for position in positions])


def _reasons(prepared: Prepared) -> dict[str, int]:
    """Why rows are missing, by code: quarantined ones, leaked ones, and unreadable files."""
    leaked = sum(reason == LEAKAGE for _, reason in prepared.repeats)
    extra = Counter({LEAKAGE: leaked, UNREADABLE_FILE: prepared.reading.unreadable})
    return dict(prepared.reading.bad) | dict(+extra)


def _question(row: QaRow) -> dict[str, Any]:
    return {
        "question": row["question"],
        "answer": row["answer"],
        "reasoning": row["reasoning"],
        "split": row["kind"] or "test",
    }


def _left_out(prepared: Prepared) -> Iterable[dict[str, Any]]:
    for row, reason in prepared.repeats:
        yield {"file": row["file"], "line": row["line"], "reason": reason}
    for position, tokens in prepared.tokenized.too_long.items():
        row = prepared.rows[position]
        yield {"file": row["file"], "line": row["line"], "reason": TOO_LONG, "tokens": tokens}


def _write_lines(path: Path, values: Iterable[dict[str, Any]]) -> None:
    with path.open("w", encoding="utf-8") as stream:
        for value in values:
            stream.write(json.dumps(value, ensure_ascii=False) + "\n")
