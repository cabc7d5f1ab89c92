"""Placement of every usable row: trained on, held out, or left out for one reason.

No question is both trained on and held out, nor is a training row kept that nearly equals a
held-out one. Rows that are too long are found later, while tokenising.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import IntEnum
from typing import TYPE_CHECKING

import numpy as np

from qwen3ft.config import TrainingConfig
from qwen3ft.data.row_features import compared_text
from qwen3ft.data.row_table import RowTable
from qwen3ft.data.splits import (
    DUPLICATE,
    HELD_OUT_ROLES,
    KEPT,
    LEAKAGE,
    ROLES,
    Hashes,
    Keys,
    Mask,
    cap_sources,
    find_repeats,
    hold_out,
    leaks,
    sample,
)

if TYPE_CHECKING:
    from qwen3ft.data.reading import Reading


class Fate(IntEnum):
    """Place of a usable row."""

    TRAIN = 0  # the first three are the codes of `splits.ROLES`
    DEV = 1
    TEST = 2
    DUPLICATE = 3
    """The content is that of an earlier row of its role."""
    LEAKAGE = 4
    """The question is held out."""
    NEAR_LEAKAGE = 5
    """The row is nearly a held-out one."""
    NEAR_DUPLICATE = 6
    """The row is nearly an earlier training row, and the config drops those."""
    NOT_USED = 7
    """The row is over a cap."""
    TOO_LONG = 8
    """The row is longer than `max_sequence_length`."""
    NO_TRAINED_TOKEN = 9
    """No token of the row would carry loss."""


DUPLICATES = (Fate.DUPLICATE, Fate.LEAKAGE, Fate.NEAR_LEAKAGE, Fate.NEAR_DUPLICATE)
"""Fates counted as duplicates in the manifest."""


@dataclass
class Placement:
    """Fate of each usable row, in reading order; changed while tokenising."""

    fates: np.ndarray
    """`Fate` as uint8, shape (rows,)."""
    new_rows: int = 0
    """Training rows not among the known ones."""
    near_duplicates: int = 0
    """Training rows that are nearly an earlier one, kept or not."""
    not_compared: int = 0
    """Rows over `row_features.MOST_COMPARED_BYTES`."""

    def count(self, *fates: Fate) -> int:
        """Return the number of rows with one of `fates`."""
        return int(np.isin(self.fates, fates).sum())

    def positions(self, fate: Fate) -> np.ndarray:
        """Return the positions of the rows with `fate`, ascending."""
        return np.flatnonzero(self.fates == fate)


def place_rows(
    reading: Reading,
    table: RowTable,
    config: TrainingConfig,
    known: Hashes | None,
) -> Placement:
    """Decide on every usable row; its length is checked later.

    Args:
        reading: Keys and signatures of the rows.
        table: Texts of the rows.
        config: Caps, held-out share, what to do with near-duplicates and known rows.
        known: Hashes of the rows seen before; None to train on all rows alike.
    """
    keys = reading.keys.build()
    repeats = find_repeats(keys)
    # By files, not by rows: an empty dev file is an error, no reason to hold out training rows.
    given = {ROLES[code] for code in np.unique(keys.role)} | {file.role for file in reading.files}
    missing = [role for role in HELD_OUT_ROLES if role not in given]
    kept = repeats == KEPT
    fates = hold_out(keys, kept, config.held_out_fraction, missing)
    leaked = leaks(keys, fates, kept)
    fates[repeats == DUPLICATE] = Fate.DUPLICATE
    fates[leaked | (repeats == LEAKAGE)] = Fate.LEAKAGE
    placement = Placement(fates)
    _place_near(placement, reading, table, config)
    # The cap comes last, or it would be filled with rows that are left out all the same.
    if config.max_rows_per_source is not None:
        training = fates == Fate.TRAIN
        capped = cap_sources(keys, training, config.max_rows_per_source)
        fates[training & ~capped] = Fate.NOT_USED
    if known is not None:
        _mix(placement, keys, known, config)
    return placement


def _mix(placement: Placement, keys: Keys, known: Hashes, config: TrainingConfig) -> None:
    """Keep all new training rows, and a sample of those seen before."""
    training = placement.fates == Fate.TRAIN
    old = training & np.isin(keys.content[:, 0], known)
    placement.new_rows = int((training & ~old).sum())
    share = config.replay_fraction
    # So that replayed / (replayed + new) is the share.
    replayed = sample(keys, old, round(placement.new_rows * share / (1 - share)), config.seed)
    placement.fates[old & ~replayed] = Fate.NOT_USED


def _place_near(
    placement: Placement, reading: Reading, table: RowTable, config: TrainingConfig
) -> None:
    """Leave out rows that nearly equal a more protected one or, if configured, an earlier one."""
    near, fates = reading.near, placement.fates
    used = np.isin(fates, (Fate.TRAIN, Fate.DEV, Fate.TEST))
    giant = np.zeros(len(fates), np.bool_)
    giant[reading.not_compared] = True
    placement.not_compared = int((used & giant).sum())
    compared = used & ~giant

    def text_of(position: int) -> str:
        [row] = table.rows([position])
        return compared_text(row)

    def have(*wanted: Fate) -> Mask:
        return np.isin(fates, wanted) & compared

    # Dev first: a row that leaves dev protects no training row any more.
    fates[near.find(have(Fate.DEV), have(Fate.TEST), text_of)] = Fate.NEAR_LEAKAGE
    held_out = have(Fate.DEV, Fate.TEST)
    fates[near.find(have(Fate.TRAIN), held_out, text_of)] = Fate.NEAR_LEAKAGE
    training = have(Fate.TRAIN)
    copies = near.find(training, training, text_of)
    placement.near_duplicates = len(copies)
    if config.near_duplicates == "drop":
        fates[copies] = Fate.NEAR_DUPLICATE
