"""Hashes of the rows that a model was or could have been trained on, in a file beside its adapter.

With it the next run tells new rows from those seen before, in whatever file they stand.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np

from qwen3ft.data.splits import Hashes, Keys, Mask
from qwen3ft.model.saved_adapter import KNOWN_ROWS_FILE


def write_known_rows(folder: Path, keys: Keys, mask: Mask) -> None:
    """Write the hashes (first half of `content`) of the rows of `mask`, file by file."""
    # File by file: `operations.new_data` splits them by the counts of the manifest. 8 bytes a row
    # are enough: among a million, two share a hash with probability 3e-8 (n^2 / 2 / 2^64).
    order = np.lexsort((keys.content[mask, 0], keys.source[mask]))
    np.save(folder / KNOWN_ROWS_FILE, keys.content[mask, 0][order], allow_pickle=False)


def read_known_rows(path: Path) -> Hashes:
    """Return the hashes in a file of `write_known_rows`."""
    hashes: Hashes = np.load(path, allow_pickle=False)
    return hashes
