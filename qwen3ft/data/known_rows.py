"""Hashes of the rows that a model was or could have been trained on, in a file beside its adapter.

With it the next run tells new rows from those seen before, in whatever file they stand. A row takes
8 bytes; among a million rows, two share a hash with probability 1e-7.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np

from qwen3ft.data.splits import Hashes
from qwen3ft.model.saved_adapter import KNOWN_ROWS_FILE


def write_known_rows(folder: Path, hashes: Hashes) -> None:
    """Write the hashes of rows (first half of `splits.Keys.content`) into `folder`."""
    np.save(folder / KNOWN_ROWS_FILE, np.unique(hashes), allow_pickle=False)


def read_known_rows(path: Path) -> Hashes:
    """Return the hashes in a file of `write_known_rows`, ascending."""
    hashes: Hashes = np.load(path, allow_pickle=False)
    return hashes
