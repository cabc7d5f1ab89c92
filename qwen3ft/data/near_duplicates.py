"""Near-duplicate rows, found by MinHash and verified by their texts (`text_features.are_near`).

The same rows in the same order give the same pairs; 140 bytes a row are held. Pairs are missed: at
a similarity of 0.8 one in fifty, at 0.85 one in two thousand, and more in large buckets, which are
counted. Paraphrases, and copies that are a small part of a longer text, are not found.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable, Iterator, Sequence
from itertools import chain

import numpy as np
import rensa
from numpy.typing import NDArray

from qwen3ft.data.splits import Mask
from qwen3ft.data.text_features import Features, are_near, features, sketch
from qwen3ft.text.spans import spans
from qwen3ft.units import MIB

# Texts of similarity s agree in a band with probability s^8 (Leskovec et al., Mining of Massive
# Datasets, 3.4). A candidate agrees in two of 32: probability 0.98 at 0.8, 0.007 at 0.5.
THRESHOLD = 0.8
BANDS, BAND_VALUES = 32, 8
AGREEING_BANDS = 2

# All pairs of a bucket of n rows would be n^2 / 2, and a template may have a million rows.
BUCKET_ROWS = 16
"""In a larger bucket of a band, each row is compared with the bucket's first row alone."""

_MINHASH_SEED = 20_260
_ROWS_AT_A_TIME, _CHARACTERS_AT_A_TIME = 1000, MIB
_PAIRS_AT_A_TIME = 50_000
_CACHED_CHARACTERS = 2 * MIB

Rows = NDArray[np.int64]
Bits = NDArray[np.uint32]


class NearDuplicates:
    """Signatures of rows, and the rows that are nearly the same.

    Args:
        threshold: Least Jaccard similarity, 0 to 1; under 0.7 many pairs are not found.

    Attributes:
        verified: Candidate pairs whose texts were compared so far.
        capped_buckets: Buckets over `BUCKET_ROWS` so far: copies inside them may be missed.
    """

    def __init__(self, threshold: float = THRESHOLD) -> None:
        self._threshold = threshold
        self._chunks: list[Bits] = []
        self._rows = 0
        self.verified = 0
        self.capped_buckets = 0

    def __len__(self) -> int:
        return self._rows

    def add(self, bands: Bits) -> None:
        """Add the next rows, a few thousand, by their `band_hashes`; the first is row 0."""
        self._chunks.append(bands)
        self._rows += bands.shape[1]

    def clear(self) -> None:
        """Forget all rows."""
        self._chunks.clear()
        self._rows = 0

    def find(self, left: Mask, right: Mask, text_of: Callable[[int], str]) -> Rows:
        """Return the rows of `left` that are nearly the same as a row of `right`, ascending.

        With training rows left and held-out rows right, these must not be trained on. With the
        same mask on both sides, they nearly repeat an earlier row.

        Args:
            left: (n,) rows in question.
            right: (n,) rows to compare them with: none of `left`, or the same mask.
            text_of: Returns the text of a row again; called for candidates alone.
        """
        return np.flatnonzero(self.twins(left, right, text_of) >= 0)

    def twins(self, left: Mask, right: Mask, text_of: Callable[[int], str]) -> Rows:
        """Return (n,) the row that each of `left` is nearly the same as, or -1; see `find`."""
        cached: dict[int, Features] = {}
        characters = 0

        def read(row: int) -> Features:
            nonlocal characters
            if row not in cached:
                text = text_of(row)
                if (characters := characters + len(text)) > _CACHED_CHARACTERS:
                    cached.clear()
                    characters = len(text)
                cached[row] = features(text)
            return cached[row]

        twin = np.full(self._rows, -1, np.int64)
        for pairs in self.pairs(left, right):
            for one, other in pairs[twin[pairs[:, 0]] < 0].tolist():
                if twin[one] >= 0:
                    continue
                self.verified += 1
                if are_near(read(one), read(other), self._threshold):
                    twin[one] = other
        return twin

    def pairs(self, left: Mask, right: Mask) -> Iterator[Rows]:
        """Yield candidates: (m, 2) rows of `left` and `right` that agree in `AGREEING_BANDS`.

        Each pair comes once. With the same mask on both sides, a row is paired with earlier ones.
        """
        bands = self._bands()
        one_set = bool((left == right).all())
        rows = np.flatnonzero(left | right)
        capped, first = np.zeros((2, self._rows), np.uint32)
        for band in range(BANDS):
            # Stable: rows of a bucket stay in reading order, so that its leader is the earliest.
            order = rows[np.argsort(bands[band, rows], kind="stable")]
            bucket = _numbered(bands[band, order])
            in_large = np.bincount(bucket)[bucket] > BUCKET_ROWS
            large, number = order[in_large], bucket[in_large]
            leaders = _leaders(large, number, right)
            self.capped_buckets += len(np.unique(number))
            with_leaders = [_with_leaders(large, number, leaders)]
            for pairs in chain(with_leaders, _within(order[~in_large], bucket[~in_large])):
                for start in range(0, len(pairs), _PAIRS_AT_A_TIME):
                    part = pairs[start : start + _PAIRS_AT_A_TIME]
                    part = _oriented(part, left, right, one_set=one_set)
                    yield part[_is_new(part, bands, band, capped, first)]
            bit = np.uint32(1 << band)
            capped[large] |= bit
            first[leaders[leaders >= 0]] |= bit

    def _bands(self) -> Bits:
        """Return the hashes of all rows, (bands, n)."""
        if len(self._chunks) != 1:  # chunks are released one by one: nothing is held twice
            bands = np.empty((BANDS, self._rows), np.uint32)
            end = self._rows
            while self._chunks:
                chunk = self._chunks.pop()
                start = end - chunk.shape[1]
                bands[:, start:end] = chunk
                end = start
            self._chunks = [bands]
        return self._chunks[0]


def band_hashes(texts: Sequence[str | None]) -> Bits:
    """Return the signatures of rows by their `as_text`: (bands, rows) numbers.

    They are equal where the texts agree in a band, in their numbers and in a short answer. None
    stands for a row that is compared with none: no mask of `NearDuplicates.find` may have it.
    """
    given = list(dict.fromkeys(text for text in texts if text is not None))  # repeats cost nothing
    bands = np.zeros((BANDS, len(given) + 1), np.uint32)
    sizes = [len(text) for text in given]
    for start, end in spans(sizes, _ROWS_AT_A_TIME, _CHARACTERS_AT_A_TIME):
        bands[:, start:end] = _hashed(given[start:end])
    column: dict[str | None, int] = {text: place for place, text in enumerate(given)}
    column[None] = len(given)
    return bands[:, [column[text] for text in texts]]


def _hashed(texts: Sequence[str]) -> Bits:
    # Rows with other numbers or another short answer are never nearly the same. Kept apart here,
    # rows of one template do not fill the same buckets.
    sketches = [sketch(text) for text in texts]
    shingles = [one for one, _ in sketches]
    hashes = np.empty((len(texts), BANDS), np.uint64)
    hashes.T[:] = [zlib.crc32(telling.encode("utf-8", "surrogatepass")) for _, telling in sketches]
    # rensa rather than datasketch: 256 values in a fraction of its time for 128.
    rows = rensa.RMinHash.digests_from_token_sets(shingles, BANDS * BAND_VALUES, _MINHASH_SEED)
    signatures = np.asarray(rows, np.uint32).reshape(len(texts), BANDS, BAND_VALUES)
    # Multiplied by 2^64 / golden ratio (Knuth, The Art of Computer Programming 3, 6.4), whose high
    # bits depend on all of the input; the shift brings them down for the next product.
    for value in range(BAND_VALUES):
        hashes ^= signatures[:, :, value]
        hashes *= np.uint64(0x9E3779B97F4A7C15)
        hashes ^= hashes >> np.uint64(29)
    return (hashes >> np.uint64(32)).astype(np.uint32).T


def _numbered(values: Bits) -> Rows:
    """Return (n,) the number of the run of equal values that each of the sorted `values` is in."""
    starts = np.zeros(len(values), np.int64)
    np.cumsum(values[1:] != values[:-1], out=starts[1:])
    return starts


def _leaders(rows: Rows, bucket: Rows, right: Mask) -> Rows:
    """Return (buckets,) the first row of `right` in each bucket, -1 for none."""
    leaders = np.full(int(bucket.max(initial=-1)) + 1, -1, np.int64)
    wanted = np.flatnonzero(right[rows])[::-1]
    leaders[bucket[wanted]] = rows[wanted]  # the last one written is the first of its bucket
    return leaders


def _with_leaders(rows: Rows, bucket: Rows, leaders: Rows) -> Rows:
    pairs = np.stack((rows, leaders[bucket]), axis=1)
    real: Mask = (pairs[:, 1] >= 0) & (pairs[:, 0] != pairs[:, 1])
    return pairs[real]


def _within(rows: Rows, bucket: Rows) -> Iterator[Rows]:
    """Yield all pairs of rows in the same bucket, by their distance in the order."""
    for distance in range(1, BUCKET_ROWS):
        same = np.flatnonzero(bucket[distance:] == bucket[:-distance])
        if not len(same):
            return
        yield np.stack((rows[same], rows[same + distance]), axis=1)


def _oriented(pairs: Rows, left: Mask, right: Mask, *, one_set: bool) -> Rows:
    """Return the pairs with a row of each side, that of `left` (of one set: the later) first."""
    if one_set:
        return np.sort(pairs, axis=1)[:, ::-1]
    one, other = pairs.T
    straight = pairs[left[one] & right[other]]
    return np.concatenate((straight, pairs[left[other] & right[one]][:, ::-1]))


def _is_new(pairs: Rows, bands: Bits, band: int, capped: Bits, first: Bits) -> Mask:
    """Return (m,) pairs that agree in enough bands, and did not come up in an earlier one."""
    one, other = pairs.T
    agree = bands[:, one] == bands[:, other]
    bits = (np.uint32(1) << np.arange(BANDS, dtype=np.uint32))[:, None]
    agreeing = np.bitwise_or.reduce(agree * bits, axis=0)
    # In a large bucket a pair comes up only if one of the two is the leader: agreement in such a
    # band does not mean that the pair came up there.
    passed_over = capped[one] & ~(first[one] | first[other])
    earlier = agreeing & ~passed_over & np.uint32((1 << band) - 1)
    enough: Mask = agree.sum(axis=0) >= AGREEING_BANDS
    new: Mask = enough & (earlier == 0)
    return new
