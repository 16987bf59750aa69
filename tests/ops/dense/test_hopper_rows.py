"""Which rows the Hopper kernel of few rows takes; what it computes is tested on GPUs."""

from __future__ import annotations

import pytest
import torch

from longspan.ops.dense import hopper_rows
from longspan.ops.tiles import hopper as hopper_tile
from tests.ops import oracle
from tests.ops.oracle import Positions


def test_which_rows_it_takes(monkeypatch: pytest.MonkeyPatch) -> None:
    """Up to 128 lanes of 7 heads, in two DCA chunks at most, on Hopper alone."""
    case = oracle.make_case(300, Positions(256, 128), num_heads=14, num_kv_heads=2, head_dim=128,
                            block_size=128, dtype=torch.bfloat16)

    def takes(count: int) -> bool:
        return hopper_rows.takes_rows(case.q[:count], case.cache, case.rotary, 300)

    assert not takes(8)
    monkeypatch.setattr(hopper_tile, "is_hopper", lambda device: True)
    for count, taken in ((0, False), (1, True), (18, True), (19, False)):
        assert takes(count) is taken, count
    short = case.rotary._replace(stride=7)
    assert not hopper_rows.takes_rows(case.q[:8], case.cache, short, 300)
    single = case.cache._replace(k=case.cache.k[:, :64], v=case.cache.v[:, :64])
    assert not hopper_rows.takes_rows(case.q[:8], single, case.rotary, 300)
