"""Near-duplicates: training rows that are almost a held-out row, found by MinHash and verified.

Guarantees: every pair found is nearly the same in the sense of `shingles.are_near`, by the texts
themselves. The same rows in the same order give the same pairs. 140 bytes a row are held, no text.
Pairs can be missed: at a similarity of 0.8 one in fifty, at 0.85 one in two thousand, and more in
buckets over `BUCKET_ROWS`, which are counted. It does not find paraphrases in other words, or
copies that are a small part of a longer text.

Signatures come from `rensa` rather than `datasketch`: full MinHash of 256 values at several times
the speed of 128 there, in Rust with wheels for CPython 3.11 to 3.13 and no dependency of its own.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable, Iterator, Sequence
from functools import lru_cache
from itertools import chain

import numpy as np
import rensa
from numpy.typing import NDArray

from qwen3ft.data.text_features import Features, are_near, as_text, features, sketch

__all__ = ["NearDuplicates", "as_text"]

THRESHOLD = 0.8

BANDS, BAND_VALUES = 32, 8
AGREEING_BANDS = 2
"""Texts of similarity s agree in one band with s^8 (Leskovec et al., Mining of Massive Datasets,
3.4). A candidate agrees in two of 32: with a chance of 0.98 at 0.8, and of 0.007 at 0.5."""

BUCKET_ROWS = 16
"""In a larger bucket of a band, each row is compared with the bucket's first row alone."""

SEED = 20_260
ROWS_AT_A_TIME = 1000
PAIRS_AT_A_TIME = 50_000
CACHED_TEXTS = 4096

Mask = NDArray[np.bool_]
Rows = NDArray[np.int64]
Bits = NDArray[np.uint32]


class NearDuplicates:
    """Signatures of rows, and the rows that are nearly the same.

    Attributes:
        verified: Candidate pairs whose texts were compared so far.
        capped_buckets: Buckets over `BUCKET_ROWS` so far; where there are many, copies inside them
            may have been missed.
    """

    def __init__(self, threshold: float = THRESHOLD) -> None:
        """Start with no rows.

        Args:
            threshold: Least Jaccard similarity, 0 to 1; under 0.7 many pairs are not found.
        """
        self._threshold = threshold
        self._chunks: list[Bits] = []
        self._rows = 0
        self.verified = 0
        self.capped_buckets = 0

    def __len__(self) -> int:
        return self._rows

    def add(self, texts: Sequence[str]) -> None:
        """Add the next rows, a few thousand at a time; the first one ever added is row 0.

        Args:
            texts: `as_text` of each row.
        """
        chunk = np.empty((BANDS, len(texts)), np.uint32)
        for start in range(0, len(texts), ROWS_AT_A_TIME):
            part = texts[start : start + ROWS_AT_A_TIME]
            chunk[:, start : start + len(part)] = _band_hashes(part)
        self._chunks.append(chunk)
        self._rows += len(texts)

    def find(self, left: Mask, right: Mask, text_of: Callable[[int], str]) -> Rows:
        """The rows of `left` that are nearly the same as a row of `right`, ascending.

        With training rows left and held-out rows right: what must not be trained on. With the same
        mask on both sides: the rows that nearly repeat an earlier one.

        Args:
            left: (n,) rows in question.
            right: (n,) rows to compare them with: none of `left`, or the same mask.
            text_of: Gives the text of a row again; asked for candidates alone.
        """
        return np.flatnonzero(self.twins(left, right, text_of) >= 0)

    def twins(self, left: Mask, right: Mask, text_of: Callable[[int], str]) -> Rows:
        """As `find`, but (n,): the row that each is nearly the same as, or -1."""

        @lru_cache(CACHED_TEXTS)
        def read(row: int) -> Features:
            return features(text_of(row))

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
        """Candidates: rows that agree in `AGREEING_BANDS`, each pair once, in many small arrays.

        Args:
            left: (n,) rows that may stand left.
            right: (n,) rows that may stand right: none of `left`, or the same mask; then each row
                is paired with earlier ones.

        Yields:
            (m, 2) a row of `left` and one of `right`.
        """
        bands = self._bands()
        one_set = bool((left == right).all())
        rows = np.flatnonzero(left | right)
        capped, first = np.zeros((2, self._rows), np.uint32)
        for band in range(BANDS):
            order = rows[np.argsort(bands[band, rows], kind="stable")]
            bucket = _numbered(bands[band, order])
            in_large = np.bincount(bucket)[bucket] > BUCKET_ROWS
            large, number = order[in_large], bucket[in_large]
            leaders = _leaders(large, number, right)
            self.capped_buckets += len(np.unique(number))
            with_leaders = [_with_leaders(large, number, leaders)]
            for pairs in chain(with_leaders, _within(order[~in_large], bucket[~in_large])):
                for start in range(0, len(pairs), PAIRS_AT_A_TIME):
                    part = pairs[start : start + PAIRS_AT_A_TIME]
                    part = _oriented(part, left, right, one_set=one_set)
                    yield part[_is_new(part, bands, band, capped, first)]
            bit = np.uint32(1 << band)
            capped[large] |= bit
            first[leaders[leaders >= 0]] |= bit

    def _bands(self) -> Bits:
        """(bands, n); the chunks are let go one by one, so that they are never held twice."""
        if len(self._chunks) != 1:
            bands = np.empty((BANDS, self._rows), np.uint32)
            end = self._rows
            while self._chunks:
                chunk = self._chunks.pop()
                start = end - chunk.shape[1]
                bands[:, start:end] = chunk
                end = start
            self._chunks = [bands]
        return self._chunks[0]


def _band_hashes(texts: Sequence[str]) -> Bits:
    """(bands, rows): equal where the signatures agree in the band, and the telling parts too.

    Rows with other numbers or another short answer are never nearly the same; kept apart here,
    rows of one template do not fill the same buckets.
    """
    sketches = [sketch(text) for text in texts]
    shingles = [one for one, _ in sketches]
    hashes = np.empty((len(texts), BANDS), np.uint64)
    hashes.T[:] = [zlib.crc32(telling.encode("utf-8", "surrogatepass")) for _, telling in sketches]
    rows = rensa.RMinHash.digests_from_token_sets(shingles, BANDS * BAND_VALUES, SEED)
    signatures = np.asarray(rows, np.uint32).reshape(len(texts), BANDS, BAND_VALUES)
    for value in range(BAND_VALUES):
        hashes ^= signatures[:, :, value]
        hashes *= np.uint64(0x9E3779B97F4A7C15)
        hashes ^= hashes >> np.uint64(29)
    return (hashes >> np.uint64(32)).astype(np.uint32).T


def _numbered(values: Bits) -> Rows:
    """(n,) the number of the run of equal values that each of the sorted `values` is in."""
    starts = np.zeros(len(values), np.int64)
    np.cumsum(values[1:] != values[:-1], out=starts[1:])
    return starts


def _leaders(rows: Rows, bucket: Rows, right: Mask) -> Rows:
    """(buckets,) the first row of `right` in each bucket, by the bucket's number; -1 for none."""
    leaders = np.full(int(bucket.max(initial=-1)) + 1, -1, np.int64)
    wanted = np.flatnonzero(right[rows])[::-1]
    leaders[bucket[wanted]] = rows[wanted]  # the last one written is the first of its bucket
    return leaders


def _with_leaders(rows: Rows, bucket: Rows, leaders: Rows) -> Rows:
    pairs = np.stack((rows, leaders[bucket]), axis=1)
    real: Mask = (pairs[:, 1] >= 0) & (pairs[:, 0] != pairs[:, 1])
    return pairs[real]


def _within(rows: Rows, bucket: Rows) -> Iterator[Rows]:
    """All pairs of rows in the same bucket, by their distance in the order."""
    for distance in range(1, BUCKET_ROWS):
        same = np.flatnonzero(bucket[distance:] == bucket[:-distance])
        if not len(same):
            return
        yield np.stack((rows[same], rows[same + distance]), axis=1)


def _oriented(pairs: Rows, left: Mask, right: Mask, *, one_set: bool) -> Rows:
    """The pairs with one row of each side, that of `left` first; of one set, the later first."""
    if one_set:
        return np.sort(pairs, axis=1)[:, ::-1]
    one, other = pairs.T
    straight = pairs[left[one] & right[other]]
    return np.concatenate((straight, pairs[left[other] & right[one]][:, ::-1]))


def _is_new(pairs: Rows, bands: Bits, band: int, capped: Bits, first: Bits) -> Mask:
    """(m,) pairs that agree in enough bands, and did not come up in an earlier one."""
    one, other = pairs.T
    agree = bands[:, one] == bands[:, other]
    bits = (np.uint32(1) << np.arange(BANDS, dtype=np.uint32))[:, None]
    agreeing = np.bitwise_or.reduce(agree * bits, axis=0)
    passed_over = capped[one] & ~(first[one] | first[other])
    earlier = agreeing & ~passed_over & np.uint32((1 << band) - 1)
    enough: Mask = agree.sum(axis=0) >= AGREEING_BANDS
    new: Mask = enough & (earlier == 0)
    return new
