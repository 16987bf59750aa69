"""Ladders and tallies of a calibration: which budgets a head is given, and what is said of it."""

from __future__ import annotations

import json

import pytest
import torch

from longspan.attention.calibrate import (
    CANDIDATES,
    GROWTH,
    SEARCH_LEN,
    Tally,
    achieved,
    best_candidates,
    candidates,
    check_threshold,
    ladder,
    refined,
)
from longspan.attention.sparsity import SparsityPlan
from longspan.errors import LongspanError

POLICY = SparsityPlan.default(2, 3)


def tally_of(recalls: list[list[list[float]]]) -> Tally:
    """Means over two segments of 3 and 5 rows, [steps][L][H]."""
    tally = Tally(len(recalls), len(recalls[0]), len(recalls[0][0]))
    for layer in range(len(recalls[0])):
        found = torch.tensor([step[layer] for step in recalls], dtype=torch.float64)
        for rows in (3, 5):
            tally.add(layer, found * rows, torch.full((3,), 0.25 * rows),
                      torch.full((3,), 4.0 * rows), rows)
    return tally


def test_search_chooses_what_keeps_most_and_the_first_of_equals() -> None:
    plans = candidates(POLICY, SEARCH_LEN)
    found = [[[0.5, 0.9, 0.2], [0.1, 0.1, 0.1]], [[0.503, 0.8, 0.2], [0.1, 0.1, 0.9]],
             [[0.5, 0.7, 0.6], [0.2, 0.1, 0.9]], [[0.5, 0.6, 0.9], [0.1, 0.1, 0.9]]]
    plan = best_candidates(tally_of(found), plans)
    chosen = [[list(zip(plan.vertical[layer], plan.slash[layer], strict=True))[head]
               for head in range(3)] for layer in range(2)]
    assert chosen == [[CANDIDATES[0], CANDIDATES[0], CANDIDATES[3]],
                      [CANDIDATES[2], CANDIDATES[0], CANDIDATES[1]]]
    assert candidates(POLICY, SEARCH_LEN // 10)[3].vertical[0][0] == 350


def test_each_head_takes_the_first_step_that_reaches_the_threshold() -> None:
    initial = SparsityPlan.default(2, 3, vertical=100, slash=200)
    found = [[[min(1.0, base + 0.1 * step) for base in (0.9, 0.65, 0.1)], [0.5, 0.3, 0.95]]
             for step in range(len(GROWTH))]
    tally = tally_of(found)
    plan = refined(tally, initial, 0.9)
    last = round(100 * GROWTH[-1])
    assert plan.vertical == ((100, round(100 * GROWTH[3]), last), (last, last, 100))
    assert plan.slash[0] == (200, round(200 * GROWTH[3]), 2 * last)
    means = achieved(tally, 0.9)
    assert means[0] == pytest.approx([0.9, 0.95, 0.7]) and means[1] == pytest.approx(
        [0.5, 0.3, 0.95])
    assert tally.output_errors()[1] == pytest.approx([0.25] * 3)
    assert [p.vertical[0][0] for p in ladder(initial)] == [round(100 * f) for f in GROWTH]


def test_a_tally_survives_a_file() -> None:
    tally = tally_of([[[0.1, 0.2, 0.3]] * 2])
    again = Tally.load(json.loads(json.dumps(tally.as_dict())))
    assert again.recalls() == tally.recalls() and again.rows == [8, 8]


@pytest.mark.parametrize("value", [0.0, 1.0, -0.1, 90.0, float("nan")])
def test_thresholds_out_of_range(value: float) -> None:
    with pytest.raises(LongspanError, match="above 0 and below 1"):
        check_threshold(value)
