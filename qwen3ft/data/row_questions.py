"""What each training row asks, and in which file: with it a run shows the rows that are new to it.

    questions.parquet    hash (uint64, as in known_rows.npy), source (uint32), question (text, cut)

About 10 bytes a row for hash and source; of the questions only those that are shown are read.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    import pyarrow as pa

QUESTIONS_FILE = "questions.parquet"

KEPT_CHARACTERS = 400
"""Of a question; more than is shown, so that a secret at the end of that is still recognised."""

EXAMPLES = 5


@dataclass(frozen=True)
class NewRows:
    """Rows that were not seen before: how many of each source, and what a few of them ask."""

    counts: dict[int, int]
    examples: tuple[str, ...]


def write_questions(
    path: Path,
    questions: Iterable[pa.Array],
    hashes: NDArray[np.uint64],
    sources: NDArray[np.uint32],
    wanted: NDArray[np.bool_],
) -> None:
    """Keep the questions of the rows that are `wanted`.

    Args:
        path: Made, or replaced.
        questions: Of all rows in order, batch by batch.
        hashes: (n,) of all rows, as `known_rows.write_known_rows` takes them.
        sources: (n,) number of the file that each row came from.
        wanted: (n,) which rows to keep.
    """
    import pyarrow as pa
    import pyarrow.compute as pc
    import pyarrow.parquet as pq

    schema = pa.schema(
        [("hash", pa.uint64()), ("source", pa.uint32()), ("question", pa.large_string())]
    )
    start = 0
    with pq.ParquetWriter(path, schema, compression="zstd") as writer:
        for batch in questions:
            rows = slice(start, start + len(batch))
            kept = batch.filter(pa.array(wanted[rows]))
            texts = pc.utf8_slice_codeunits(kept, 0, KEPT_CHARACTERS)
            columns = [hashes[rows][wanted[rows]], sources[rows][wanted[rows]], texts]
            writer.write_batch(pa.record_batch(columns, schema=schema))
            start += len(batch)


def find_new_rows(path: Path, known: NDArray[np.uint64]) -> NewRows:
    """The rows of a file of `write_questions` that are not `known`, each hash counted once.

    The examples are the same for the same rows, in whatever order they were read: of each source
    in turn the one with the smallest hash.
    """
    import pyarrow.parquet as pq

    if not path.is_file():  # made by an earlier version
        return NewRows({}, ())
    table = pq.read_table(path, columns=["hash", "source"])
    hashes, places = np.unique(table.column("hash").to_numpy(), return_index=True)
    sources = table.column("source").to_numpy()[places]
    is_new = ~np.isin(hashes, known, assume_unique=True)
    hashes, sources = hashes[is_new], sources[is_new]
    numbers, counts = np.unique(sources, return_counts=True)
    ranks = np.zeros(len(sources), np.int64)  # of a row within its source, by hash
    for number in numbers:
        ranks[sources == number] = np.arange(int((sources == number).sum()))
    chosen = hashes[np.lexsort((sources, ranks))[:EXAMPLES]]
    found = dict(zip(numbers.tolist(), counts.tolist(), strict=True))
    return NewRows(found, _questions(path, chosen))


def _questions(path: Path, chosen: NDArray[np.uint64]) -> tuple[str, ...]:
    """What the rows with these hashes ask, in their order."""
    import pyarrow as pa
    import pyarrow.compute as pc
    import pyarrow.parquet as pq

    if not len(chosen):
        return ()
    wanted = pc.field("hash").isin(pa.array(chosen, pa.uint64()))
    table = pq.read_table(path, columns=["hash", "question"], filters=wanted)
    columns = (table.column(name).to_pylist() for name in ("hash", "question"))
    texts = dict(zip(*columns, strict=True))
    return tuple(texts[number] for number in chosen.tolist())
