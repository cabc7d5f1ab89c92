"""Which rows a model has been trained on, or could have been: a file of hashes beside its adapter.

With it the next run tells new rows from those seen before, whatever file they stand in. 8 bytes a
row: two different rows share a hash with a chance of one in 10**7 among a million.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from qwen3ft.model.saved_adapter import KNOWN_ROWS_FILE

Hashes = NDArray[np.uint64]


def write_known_rows(folder: Path, hashes: Hashes) -> None:
    """Keep the hashes of the rows (first half of `splits.Keys.content`) in `folder`."""
    np.save(folder / KNOWN_ROWS_FILE, np.unique(hashes), allow_pickle=False)


def read_known_rows(path: Path) -> Hashes:
    """The hashes in a file of `write_known_rows`, ascending."""
    hashes: Hashes = np.load(path, allow_pickle=False)
    return hashes
