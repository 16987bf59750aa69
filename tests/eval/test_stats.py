"""Wilson's interval against published values."""

from __future__ import annotations

import pytest

from longspan.eval.stats import wilson_interval


@pytest.mark.parametrize(("num_right", "n", "low", "high"), [
    (10, 10, 0.7225, 1.0), (0, 10, 0.0, 0.2775), (5, 10, 0.2366, 0.7634), (20, 20, 0.8389, 1.0),
    (50, 50, 0.9287, 1.0), (95, 100, 0.8882, 0.9785), (0, 0, 0.0, 1.0),
])
def test_known_values(num_right: int, n: int, low: float, high: float) -> None:
    assert wilson_interval(num_right, n) == pytest.approx((low, high), abs=1e-4)
