"""Tokenised rows on disk, written in order while tokenising and mapped for training.

One Arrow stream per split. Training reads the columns `input_ids` (int32 tokens), `trained` (int32:
start and end of each stretch that carries loss, end exclusive) and `length` (int32). The others say
where each row came from (`Origin`), so that a run can show which of its rows are new.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from qwen3ft.records.data import LengthSummary

if TYPE_CHECKING:
    import pyarrow as pa
    from datasets import Dataset

    from qwen3ft.chat.rendering import TokenizedRow

_TRAINED_ON = ["input_ids", "trained", "length"]


class Origin(NamedTuple):
    """Where a row came from."""

    hash: int = 0
    """First half of `splits.Keys.content`, as in the file of known rows."""
    source: int = 0
    """Number of its file, in the manifest's order."""
    question: str = ""
    """Beginning of its question."""


def _schema() -> pa.Schema:
    import pyarrow as pa

    tokens = pa.list_(pa.int32())
    columns = [("input_ids", tokens), ("trained", tokens), ("length", pa.int32())]
    origin = [("hash", pa.uint64()), ("source", pa.uint32()), ("question", pa.large_string())]
    return pa.schema([*columns, *origin])


def token_batch(rows: Sequence[TokenizedRow], origins: Sequence[Origin] = ()) -> pa.RecordBatch:
    """Return at least one row as Arrow's columns, with their origins where they are known."""
    import pyarrow as pa

    lengths = np.array([len(row) for row in rows], np.int32)
    ids = np.frombuffer(b"".join(row.packed for row in rows), np.int32)
    spans = [np.array(row.trained, np.int32).ravel() for row in rows]
    hashes, sources, questions = zip(*(origins or [Origin()] * len(rows)), strict=True)
    columns: dict[str, Any] = {
        "input_ids": _lists(ids, lengths),
        "trained": _lists(np.concatenate(spans), [len(span) for span in spans]),
        "length": lengths,
        "hash": hashes,
        "source": sources,
        "question": questions,
    }
    return pa.record_batch(columns, schema=_schema())


def _lists(values: np.ndarray, lengths: Sequence[int] | np.ndarray) -> pa.ListArray:
    """Return an Arrow array of lists: `values`, cut into pieces of `lengths`."""
    import pyarrow as pa

    ends = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int32)
    return pa.ListArray.from_arrays(pa.array(ends), pa.array(values))


class TokenWriter(AbstractContextManager["TokenWriter"]):
    """Appends tokenised rows to the file `path`; a context manager, complete when it is left."""

    def __init__(self, path: Path) -> None:
        import pyarrow as pa

        # A stream, since `Dataset.from_file` maps streams alone.
        self._writer = pa.ipc.new_stream(str(path), _schema())
        self._parts: list[np.ndarray] = []
        self.trained_tokens = 0

    def __exit__(self, *_: object) -> None:
        self._writer.close()

    def write(self, batch: pa.RecordBatch) -> None:
        """Append the rows of a `token_batch`, or of a part of it."""
        self._writer.write_batch(batch)
        # Copied: a view would keep the whole batch in memory.
        self._parts.append(batch.column("length").to_numpy().copy())
        edges = batch.column("trained").flatten().to_numpy().reshape(-1, 2)
        self.trained_tokens += int((edges[:, 1] - edges[:, 0]).sum())

    def summary(self) -> LengthSummary:
        """Return the token lengths of what was written; percentiles are lengths that occur."""
        lengths = np.concatenate([np.zeros(0, np.int32), *self._parts])
        median, p95 = np.percentile(lengths, (50, 95), method="higher") if len(lengths) else (0, 0)
        return LengthSummary(
            rows=len(lengths),
            tokens=int(lengths.sum()),
            trained_tokens=self.trained_tokens,
            longest_tokens=int(lengths.max(initial=0)),
            median_tokens=int(median),
            p95_tokens=int(p95),
        )


def load_split(folder: Path, split: str) -> Dataset:
    """Map the rows of `split` (train or dev) of a data folder from disk."""
    from datasets import Dataset

    return Dataset.from_file(str(folder / f"{split}.arrow")).select_columns(_TRAINED_ON)


def read_origins(folder: Path) -> pa.Table | None:
    """Map the origins of the training rows; None if an earlier version made the folder."""
    import pyarrow as pa

    table = pa.ipc.open_stream(pa.memory_map(str(folder / "train.arrow"))).read_all()
    return table.select(Origin._fields) if set(Origin._fields) <= {*table.column_names} else None
