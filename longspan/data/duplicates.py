"""Texts that were read before: exactly (SHA-256) or nearly (MinHash).

The sketch is one-permutation hashing (Li, Owen, Zhang 2012): every run of `SHINGLE` bytes has one
hash, the first bits choose a bin, each bin keeps its least hash. Two sketches agree in as many bins
as their texts have runs in common (Jaccard index). Candidates share all bins of a band.
"""

from __future__ import annotations

import hashlib

import numpy as np

NUM_BINS = 128
BAND = 5
"""Bins of a band: of texts with 80 % in common, one in twenty thousand has no common band."""
SHINGLE = 24
"""Bytes of a run: four or five English words, eight Chinese characters."""
_PART = 1 << 20
_EMPTY = np.uint64(2**64 - 1)


class Duplicates:
    """Remembers texts. ``threshold``: share of runs in common from which a text is a near
    duplicate; None: only exact ones are found."""

    def __init__(self, threshold: float | None) -> None:
        self.threshold = threshold
        self._digests: set[bytes] = set()
        self._bands: dict[int, list[int]] = {}
        self._sketches: list[np.ndarray] = []

    def find(self, text: str) -> str | None:
        """``duplicate``, ``near-duplicate``, or None for a new text, which is remembered."""
        normal = " ".join(text.lower().split()).encode()
        digest = hashlib.sha256(normal).digest()
        if digest in self._digests:
            return "duplicate"
        self._digests.add(digest)
        if self.threshold is None:
            return None
        return self._find_near(sketch(normal))

    def _find_near(self, new: np.ndarray) -> str | None:
        starts = range(0, NUM_BINS - BAND + 1, BAND)
        bands = [hash((i, new[i : i + BAND].tobytes())) for i in starts]
        for index in {index for band in bands for index in self._bands.get(band, ())}:
            if (self._sketches[index] == new).mean() >= (self.threshold or 0):
                return "near-duplicate"
        self._sketches.append(new)
        for band in bands:
            self._bands.setdefault(band, []).append(len(self._sketches) - 1)
        return None


def sketch(data: bytes) -> np.ndarray:
    """Least hash of each bin, uint64 [NUM_BINS]; an empty bin has that of the next full one."""
    bins = np.full(NUM_BINS, _EMPTY)
    for start in range(0, max(1, len(data) - SHINGLE + 1), _PART):
        hashes = np.sort(_hashes(data[start : start + _PART + SHINGLE - 1]))
        edges = np.searchsorted(hashes, np.arange(NUM_BINS, dtype=np.uint64) << np.uint64(57))
        full = np.diff(edges, append=len(hashes)) > 0
        bins[full] = np.minimum(bins[full], hashes[edges[full]])
    full_bins = np.flatnonzero(bins != _EMPTY)
    return bins[full_bins[np.searchsorted(full_bins, np.arange(NUM_BINS)) % len(full_bins)]]


def _hashes(data: bytes) -> np.ndarray:
    """Hash of each run of `SHINGLE` bytes; a shorter text is one run."""
    values = np.frombuffer(data.ljust(SHINGLE), np.uint8).astype(np.uint64)
    count = len(values) - SHINGLE + 1
    total = np.zeros(count, np.uint64)
    for i in range(SHINGLE):
        total = total * np.uint64(0x100000001B3) + values[i : i + count]
    # The finaliser of SplitMix64: each bit of the sum changes half of the hash.
    total = (total ^ (total >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    total = (total ^ (total >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return total ^ (total >> np.uint64(31))
