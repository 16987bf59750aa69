"""The schedule: shapes, shares, rates, validation."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from typing import Any

import pytest

from longspan.train.phases import Phase, learning_rate, validate_phases


def make(**changes: Any) -> Phase:
    values: dict[str, Any] = {
        "name": "p", "seq_len": 1024, "rope_theta": 1e6, "num_tokens": 409_600,
        "learning_rate": 1e-3, "shorter": (512, 256), "full_share": 0.75, "tokens_per_step": 4096}
    return Phase(**(values | changes))


def test_share_counts_sequences_not_steps() -> None:
    phase = make(num_tokens=4096 * 1000)
    schedule = phase.schedule()
    assert len(schedule) == phase.num_steps == 1000
    assert all(rows * length == 4096 for rows, length in schedule)
    sequences: Counter[int] = Counter()
    for rows, length in schedule:
        sequences[length] += rows
    assert abs(sequences[1024] / sequences.total() - 0.75) < 0.01
    assert schedule[-1] == (4, 1024)
    assert schedule == phase.schedule() != phase.schedule(seed=1)


@pytest.mark.parametrize(
    ("changes", "message"),
    [({"seq_len": 1000}, "multiple of"), ({"num_tokens": 100}, "less than one step"),
     ({"shorter": ()}, "shorter lengths exactly when"),
     ({"full_share": 0.0}, "shorter lengths exactly when"),
     ({"shorter": (2048,)}, "must be below 1024")])
def test_bad_phases_are_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make(**changes)


def test_lengths_and_bases_do_not_fall() -> None:
    phase = make()
    validate_phases([phase, replace(phase, rope_theta=1e7)])
    with pytest.raises(ValueError, match="falls back"):
        validate_phases([phase, replace(phase, rope_theta=1e4)])
    with pytest.raises(ValueError, match="at least one"):
        validate_phases([])


def test_rate_warms_up_holds_glides_and_decays() -> None:
    phases = [make(), make(learning_rate=5e-4)]
    rates = [learning_rate(phases, 0, s, 100, 20, 5e-5) for s in range(100)]
    assert rates[0] == pytest.approx(1e-3 / 20) and rates[19:] == [1e-3] * 81
    later = [learning_rate(phases, 1, s, 100, 20, 5e-5) for s in range(100)]
    assert later[0] == pytest.approx(9.5e-4) and later[20] == pytest.approx(5e-4)
    assert later[-1] == pytest.approx(5e-5)
    assert later[10:] == sorted(later[10:], reverse=True)
