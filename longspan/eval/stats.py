"""Intervals of measured scores, paired comparisons, and the area under a score-length curve."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

Z_95 = 1.959963984540054
NUM_DRAWS = 10_000
MIN_DRAWN = 6
"""Fewer prompts than this, or pairs, are no sample to draw a bootstrap from: its intervals are far
too narrow, and no sign test of five pairs reaches p = 0.05."""
SEED = 0
"""The seed of bootstraps and permutations: the same samples give the same intervals."""


@dataclass(frozen=True, slots=True)
class Estimate:
    """A mean with its 95 % interval."""

    mean: float
    low: float
    high: float
    n: int
    method: str


def estimate(scores: Sequence[float], is_binary: bool, clusters: Sequence[object] = ()) -> Estimate:
    """Estimate the mean of scores from 0 to 1: Wilson's interval for right and wrong, bootstrap for
    shares.

    Scores that are all alike, or few, leave a bootstrap without spread; as no share varies more
    than right and wrong do, Wilson's interval stands in for it.

    Args:
        clusters: the document of each score, where several share one: documents are drawn then.
    """
    n = len(scores)
    mean = float(np.mean(scores)) if n else 0.0
    is_share = all(0 <= score <= 1 for score in scores)
    if is_share and (is_binary or len(set(scores)) <= 1 or n < MIN_DRAWN):
        return Estimate(mean, *wilson_interval(sum(scores), n), n, "wilson")
    return Estimate(mean, *bootstrap_interval(scores, clusters), n, "bootstrap")


def nats_estimate(values: Sequence[float], clusters: Sequence[object] = ()) -> Estimate:
    """Estimate the mean of numbers that have no bounds, by bootstrap. One alone, or one document
    alone, says nothing about the spread: its method is empty, its interval no interval."""
    n = len(set(clusters)) if clusters else len(values)
    mean = float(np.mean(values))
    if n < 2:
        return Estimate(mean, mean, mean, len(values), "")
    return Estimate(mean, *bootstrap_interval(values, clusters), len(values), "bootstrap")


def wilson_interval(num_right: float, n: int, z: float = Z_95) -> tuple[float, float]:
    """Return Wilson's interval for a share, 95 % by default; (0, 1) without trials."""
    if n == 0:
        return 0.0, 1.0
    share = num_right / n
    scale = 1 + z * z / n
    centre = (share + z * z / (2 * n)) / scale
    half = z * math.sqrt(share * (1 - share) / n + z * z / (4 * n * n)) / scale
    return max(0.0, centre - half), min(1.0, centre + half)


def bootstrap_interval(
    scores: Sequence[float], clusters: Sequence[object] = ()
) -> tuple[float, float]:
    """Return the 95 % percentile interval of the mean, over prompts or over clusters of them."""
    sums, counts = _by_cluster(scores, clusters or range(len(scores)))
    picks = np.random.default_rng(SEED).integers(0, len(sums), (NUM_DRAWS, len(sums)))
    means = sums[picks].sum(1) / counts[picks].sum(1)
    low, high = np.quantile(means, [0.025, 0.975])
    return float(low), float(high)


def combine(parts: Sequence[Estimate], weights: Sequence[float]) -> Estimate:
    """Combine independent estimates into their weighted sum.

    Its interval is put together from theirs (method of variance estimates recovery), so that a part
    without spread still counts with the width that its n leaves open. Weights are not negative.
    """
    mean = sum(w * part.mean for w, part in zip(weights, parts, strict=True))
    below = sum((w * (part.mean - part.low)) ** 2 for w, part in zip(weights, parts, strict=True))
    above = sum((w * (part.high - part.mean)) ** 2 for w, part in zip(weights, parts, strict=True))
    return Estimate(mean, mean - math.sqrt(below), mean + math.sqrt(above),
                    sum(part.n for part in parts), "combined")


def curve_weights(lengths: Sequence[int]) -> list[float]:
    """Return weights that make a sum of scores the area under their curve over log2 of length,
    divided by its width: a mean in which every doubling counts alike. A single length has weight
    1."""
    places = [math.log2(length) for length in lengths]
    if len(places) == 1:
        return [1.0]
    width = places[-1] - places[0]
    weights = []
    for i, place in enumerate(places):
        left = places[i - 1] if i else place
        right = places[i + 1] if i + 1 < len(places) else place
        weights.append((right - left) / 2 / width)
    return weights


@dataclass(frozen=True, slots=True)
class Comparison:
    """Two arms on the same prompts: second minus first."""

    n: int
    difference: float
    low: float
    high: float
    num_better: int
    """Prompts on which the second arm scored higher."""
    num_worse: int
    p_value: float
    method: str

    def verdict(self, margin: float) -> str:
        """Say whether the second arm loses at most `margin`: by the interval, not by the mean."""
        if self.low > -margin:
            return "not worse"
        return "worse" if self.high < -margin else "undecided"


def compare(
    first: Sequence[float], second: Sequence[float], is_binary: bool,
    clusters: Sequence[object] = (),
) -> Comparison:
    """Compare scores in pairs on the same prompts.

    Right and wrong: exact McNemar test, Agresti and Min's interval. Shares, and questions that
    share a document: sign flips and a paired bootstrap, of documents; where no pair differs, or
    there are few, which leaves a bootstrap without spread, Agresti and Min's interval again.
    """
    differences = np.asarray(second, float) - np.asarray(first, float)
    n = len(differences)
    num_better, num_worse = int((differences > 0).sum()), int((differences < 0).sum())
    is_paired = is_binary and len(set(clusters)) in (0, n)
    are_shares = all(0 <= score <= 1 for score in (*first, *second))
    if not is_paired and n < MIN_DRAWN and are_shares:
        # a share that a pair differs by counts as that share of a discordant pair
        gains = differences.clip(0).sum(), -differences.clip(max=0).sum()
        low, high = paired_interval(float(gains[0]), float(gains[1]), n)
        p_value, method = sign_flips(differences, clusters), "sign flips"
    elif is_paired or not num_better + num_worse:
        low, high = paired_interval(num_better, num_worse, n)
        p_value, method = mcnemar(num_better, num_worse), "mcnemar"
    else:
        low, high = bootstrap_interval(differences.tolist(), clusters)
        p_value, method = sign_flips(differences, clusters), "sign flips"
    return Comparison(n, float(differences.mean()), low, high, num_better, num_worse, p_value,
                      method)


def paired_interval(num_better: float, num_worse: float, n: int, z: float = Z_95
                    ) -> tuple[float, float]:
    """Return Agresti and Min's interval for a difference of paired shares: Wald's, with half a pair
    more of each of the four kinds."""
    total, better, worse = n + 2, num_better + 0.5, num_worse + 0.5
    centre = (better - worse) / total
    half = z * math.sqrt(better + worse - (better - worse) ** 2 / total) / total
    return max(-1.0, centre - half), min(1.0, centre + half)


def mcnemar(num_better: int, num_worse: int) -> float:
    """Return the two-sided exact p of so uneven a split of discordant pairs, were both sides as
    likely."""
    n = num_better + num_worse
    tail = sum(math.comb(n, k) for k in range(min(num_better, num_worse) + 1))
    return min(1.0, 2 * tail / 2**n)


def sign_flips(differences: np.ndarray, clusters: Sequence[object] = ()) -> float:
    """Return the two-sided p of a mean difference so large, were the arms interchangeable on every
    prompt (or document)."""
    sums, _ = _by_cluster(differences.tolist(), clusters or range(len(differences)))
    signs = np.random.default_rng(SEED).choice([-1.0, 1.0], (NUM_DRAWS, len(sums)))
    as_large = (np.abs(signs @ sums) >= abs(float(sums.sum())) - 1e-12).sum()
    return float((as_large + 1) / (NUM_DRAWS + 1))


def _by_cluster(
    scores: Sequence[float], clusters: Sequence[object]
) -> tuple[np.ndarray, np.ndarray]:
    """Return (sum, count) of the scores of each cluster."""
    numbers: dict[object, int] = {}
    rows = np.array([numbers.setdefault(cluster, len(numbers)) for cluster in clusters])
    return (np.bincount(rows, np.asarray(scores, float), len(numbers)),
            np.bincount(rows, minlength=len(numbers)).astype(float))
