"""Intervals, tests and areas against published or hand-computed values."""

from __future__ import annotations

import math
import random

import numpy as np
import pytest

from longspan.eval.stats import (
    Estimate,
    bootstrap_interval,
    combine,
    compare,
    curve_weights,
    estimate,
    mcnemar,
    sign_flips,
    wilson_interval,
)


@pytest.mark.parametrize(("num_right", "n", "low", "high"), [
    (10, 10, 0.7225, 1.0), (0, 10, 0.0, 0.2775), (5, 10, 0.2366, 0.7634), (20, 20, 0.8389, 1.0),
    (50, 50, 0.9287, 1.0), (95, 100, 0.8882, 0.9785), (0, 0, 0.0, 1.0),
])
def test_wilson(num_right: int, n: int, low: float, high: float) -> None:
    assert wilson_interval(num_right, n) == pytest.approx((low, high), abs=1e-4)


def test_the_bootstrap_is_that_of_the_mean() -> None:
    rng = random.Random(7)
    scores = [rng.choice([0.0, 0.25, 0.5, 0.75, 1.0]) for _ in range(50)]
    low, high = bootstrap_interval(scores)
    half = 1.96 * float(np.std(scores)) / math.sqrt(50)
    mean = float(np.mean(scores))
    assert (low, high) == pytest.approx((mean - half, mean + half), abs=0.015)
    assert bootstrap_interval(scores) == (low, high), "the same samples, the same interval"


def test_documents_are_drawn_whole() -> None:
    """Ten documents of ten questions, all alike within one: a tenth of the information."""
    scores = [float(document % 2) for document in range(10) for _ in range(10)]
    clusters = [document for document in range(10) for _ in range(10)]
    low, high = bootstrap_interval(scores, clusters)
    assert high - low > 0.5 > 2 * 1.96 * 0.5 / math.sqrt(100) * 1.5
    assert high - low == pytest.approx(2 * 1.96 * 0.5 / math.sqrt(10), abs=0.1)


def test_estimates() -> None:
    assert estimate([1.0] * 19 + [0.0], True) == Estimate(
        0.95, *wilson_interval(19, 20), 20, "wilson")
    assert estimate([0.5, 1.0, 0.75, 0.25] * 2, False).method == "bootstrap"
    few = estimate([0.25, 0.5], False)
    assert few.low < 0.1 and few.high > 0.75, "two shares say little"
    # shares that are all alike have an interval too
    assert estimate([1.0] * 20, False).low == pytest.approx(0.8389, abs=1e-4)
    assert estimate([3.2, 3.4], False).method == "bootstrap", "nats are no shares"


def test_macro_scores_and_their_intervals() -> None:
    parts = [Estimate(0.9, 0.8, 0.95, 20, ""), Estimate(0.5, 0.3, 0.7, 30, "")]
    whole = combine(parts, [0.5, 0.5])
    assert whole.mean == pytest.approx(0.7) and whole.n == 50
    assert whole.low == pytest.approx(0.7 - math.hypot(0.05, 0.1))
    assert whole.high == pytest.approx(0.7 + math.hypot(0.025, 0.1))


def test_areas_weigh_every_doubling_alike() -> None:
    lengths = [4096 * 2**i for i in range(9)]
    weights = curve_weights(lengths)
    assert weights == pytest.approx([1 / 16] + [1 / 8] * 7 + [1 / 16])
    # a score that falls by the same step with every doubling: its mean is that in the middle
    assert sum(w * (1 - i / 8) for i, w in enumerate(weights)) == pytest.approx(0.5)
    assert curve_weights([4096, 8192, 131_072]) == pytest.approx([0.1, 0.5, 0.4])
    assert curve_weights([4096]) == [1.0]


@pytest.mark.parametrize(("better", "worse", "p"), [
    (0, 1, 1.0), (0, 5, 0.0625), (1, 9, 22 / 1024), (5, 5, 1.0), (0, 10, 2 / 1024)])
def test_mcnemar(better: int, worse: int, p: float) -> None:
    assert mcnemar(better, worse) == pytest.approx(p)
    assert mcnemar(worse, better) == pytest.approx(p)


def test_sign_flips_agree_with_all_flips() -> None:
    differences = np.array([0.5, 0.25, -0.25, 0.75, 0.5, 0.25, 0.0, 0.5])
    n = len(differences)
    sums = [abs(sum(d if bits >> i & 1 else -d for i, d in enumerate(differences)))
            for bits in range(2**n)]
    exact = sum(total >= abs(differences.sum()) - 1e-9 for total in sums) / 2**n
    assert sign_flips(differences) == pytest.approx(exact, abs=0.01)


def test_paired_comparison_of_right_and_wrong() -> None:
    first = [1.0] * 18 + [0.0, 1.0]
    second = [1.0] * 15 + [0.0] * 3 + [1.0, 1.0]
    result = compare(first, second, True)
    assert (result.n, result.num_better, result.num_worse) == (20, 1, 3)
    assert result.difference == pytest.approx(-0.1)
    assert result.p_value == pytest.approx(mcnemar(1, 3)) and result.method == "mcnemar"
    # Agresti and Min, by hand: (1.5 - 3.5) / 22 and 1.96 sqrt(5 - 4 / 22) / 22
    assert (result.low, result.high) == pytest.approx((-0.2865, 0.1046), abs=1e-3)
    assert result.verdict(0.05) == "undecided"


def test_questions_of_a_document_are_no_independent_pairs() -> None:
    first, second = [1.0] * 20, [1.0] * 15 + [0.0] * 5
    by_document = compare(first, second, True, [i // 5 for i in range(20)])
    assert by_document.method == "sign flips" and by_document.p_value == pytest.approx(1.0)
    assert compare(first, second, True).p_value == mcnemar(0, 5)


def test_verdicts_go_by_the_interval() -> None:
    same = compare([1.0] * 200, [1.0] * 200, True)
    assert (same.num_better, same.num_worse, same.p_value) == (0, 0, 1.0)
    assert -0.01 < same.low < 0 < same.high < 0.01 and same.verdict(0.05) == "not worse"
    assert compare([1.0] * 5, [1.0] * 5, True).verdict(0.05) == "undecided", "five prove little"
    few = compare([0.25, 0.5], [0.5, 0.75], False)
    assert few.difference == 0.25 and few.low < -0.3 and few.high > 0.6
    assert few.verdict(0.05) == "undecided", "two pairs that differ alike prove nothing"
    assert compare([0.6], [0.4], False).verdict(0.05) == "undecided"
    assert compare([3.0, 3.5], [3.1, 3.6], False).high == pytest.approx(0.1), "nats are no shares"
    shares = compare([1.0, 0.75, 1.0, 0.5] * 20, [0.5, 0.5, 0.25, 0.5] * 20, False)
    assert shares.method == "sign flips" and shares.verdict(0.05) == "worse"
    assert shares.p_value < 0.001
