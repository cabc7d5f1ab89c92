"""Keys and signatures of a batch of rows, by which repeats and near-duplicates are found."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from qwen3ft.chat.conversation import texts_of
from qwen3ft.data.near_duplicates import Bits, band_hashes
from qwen3ft.data.rows import asked_by
from qwen3ft.data.splits import KeysBuilder, asked_keys, content_key
from qwen3ft.data.text_features import as_text
from qwen3ft.records.data import QaRow
from qwen3ft.units import MIB

MOST_COMPARED_BYTES = MIB
"""Size of the largest row that is compared with others: its words take a hundred times as much."""


class RowFeatures(NamedTuple):
    """Features of a batch of rows, all of them that stay in memory."""

    keys: KeysBuilder
    bands: Bits
    """(bands, rows)"""
    not_compared: list[int]
    """Numbers of the rows over `MOST_COMPARED_BYTES`."""


def features_of(rows: Sequence[QaRow], sources: Sequence[int]) -> RowFeatures:
    """Return the features of rows, each from the file with its number in `sources`."""
    keys = KeysBuilder()
    texts: list[str | None] = []
    for row, source in zip(rows, sources, strict=True):
        questions = asked_by(row)
        asked, earlier = asked_keys(questions)
        said = (row["question"], row["answer"], row["reasoning"])
        # Conversations that differ in an earlier turn or in a tool are no repeats.
        around = texts_of(row["messages"], row["tools"]) if row["messages"] else ()
        content = content_key(*said, *around)
        keys.append(asked, content, row["role"], source, row["group"], earlier)
        text = compared_text(row, questions)
        texts.append(None if _is_giant(text) else text)
    not_compared = [number for number, text in enumerate(texts) if text is None]
    return RowFeatures(keys, band_hashes(texts), not_compared)


def compared_text(row: QaRow, questions: Sequence[str] = ()) -> str:
    """Return the text by which a row is compared; `questions` saves looking for what it asks."""
    return as_text("\n".join(questions or asked_by(row)), row["answer"])


def _is_giant(text: str) -> bool:
    """Return whether a text is over `MOST_COMPARED_BYTES`."""
    return len(text) > MOST_COMPARED_BYTES // 4 and len(text.encode()) > MOST_COMPARED_BYTES
